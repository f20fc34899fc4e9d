"""The files of a release name the version of the package, and tools are pinned."""

import datetime
import re
from collections import Counter

import pytest
import yaml
from engine_cases import ROOT
from setuptools.config.pyprojecttoml import read_configuration

import tempflow

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_citation_and_the_changelog_name_the_version():
    versions = re.findall(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    newest, date = versions[0]
    assert newest == CITATION["version"] == tempflow.__version__
    assert datetime.date.fromisoformat(date) == CITATION["date-released"]
    assert [day for _, day in versions] == sorted((day for _, day in versions), reverse=True)


def test_the_citation_has_what_its_format_demands():
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    (paper,) = CITATION["references"]
    assert paper["url"].endswith("2508.04324") and len(paper["authors"]) == 8


@pytest.mark.parametrize("tool", ["ruff", "mypy", "codespell"])
@pytest.mark.parametrize("file", ["constraints.txt", "constraints-gpu.txt"])
def test_a_tool_that_judges_is_pinned_and_installed_with_dev(tool, file):
    """Another version may judge otherwise."""
    dev = read_configuration(ROOT / "pyproject.toml")["project"]["optional-dependencies"]["dev"]
    assert tool in dev and re.search(rf"^{tool}==[\d.]+$", (ROOT / file).read_text(), re.M)


def test_ci_and_pre_commit_run_the_checks_of_make_lint():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    tools = re.findall(r"\$\(BIN\)/(ruff \w+|\w+)", recipe)
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = config["repos"][0]["hooks"]
    assert [hook["name"] for hook in hooks] == tools
    assert all(hook["language"] == "system" for hook in hooks)
    assert {"make lint", "make docs", "make test"} <= set(
        (ROOT / ".ci/run").read_text().split("\n")
    )


def test_a_pragma_makes_no_line_longer_than_the_limit():
    """ruff's E501 does not count a pragma at the end of a line, nor what follows it."""
    limit = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["ruff"]["line-length"]
    folders = ("engine", "kernels", "recipes", "benchmarks", "docs", "examples", "tests")
    long = [
        f"{file.relative_to(ROOT)}:{number}"
        for folder in folders
        for file in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > limit and re.search(r"# (type: ignore|noqa)", line)
    ]
    assert not long


def test_no_two_modules_that_tests_import_share_a_name():
    """Their folders are on sys.path together, where the first of two hides the second."""
    names = Counter(
        path.stem
        for folder in ("tests", "tests/*", "engine", "kernels", "recipes", "benchmarks", "docs")
        for path in ROOT.glob(f"{folder}/*")
        if path.suffix == ".py" or (path / "__init__.py").exists()
    )
    del names["conftest"]  # pytest imports each by its path
    assert [name for name, count in names.items() if count > 1] == []
