"""What can be checked of the Dockerfile where there is no Docker: names, versions and order."""

import fnmatch
import json
import re

import pytest
from engine_cases import ROOT
from packaging.specifiers import SpecifierSet
from setuptools.config.pyprojecttoml import read_configuration

TEXT = (ROOT / "Dockerfile").read_text()


def steps() -> list[tuple[str, str]]:
    """(instruction, its arguments), without comments and with continued lines joined."""
    code = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", code)
    lines = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, arguments.strip()) for name, arguments in lines]


def of(instruction: str) -> list[str]:
    return [arguments for name, arguments in steps() if name == instruction]


COPIED = [source for arguments in of("COPY") for source in arguments.split()[:-1]]


def test_it_holds_known_instructions_after_a_base():
    assert steps()[0][0] == "FROM"
    assert {name for name, _ in steps()} <= {"FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert json.loads(of("CMD")[-1])


@pytest.mark.parametrize("source", COPIED)
def test_what_it_copies_exists_and_is_sent_to_the_builder(source):
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    assert (ROOT / source).exists() and any(fnmatch.fnmatch(source, name) for name in kept)


def test_it_copies_what_the_build_reads():
    table = read_configuration(ROOT / "pyproject.toml", expand=False)
    needed = {"pyproject.toml", "constraints-gpu.txt", "README.md"}
    needed |= set(table["project"]["license-files"])
    needed |= set(table["tool"]["setuptools"]["packages"]["find"]["where"])
    assert needed <= set(COPIED)


def test_versions_come_from_the_constraints_alone():
    installs = [part for run in of("RUN") for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert all("-c constraints-gpu.txt" in part and "==" not in part for part in installs)
    extras = re.search(r"\.\[([\w,]+)\]", installs[-1])[1].split(",")
    known = read_configuration(ROOT / "pyproject.toml", expand=False)["project"][
        "optional-dependencies"
    ]
    assert "gpu" in extras and set(extras) <= set(known)


def test_the_base_has_the_cuda_of_the_pinned_torch():
    """torch 2.13's default wheels are built for CUDA 13; another torch asks for another base."""
    torch = re.search(r"^torch==([\d.]+)$", (ROOT / "constraints-gpu.txt").read_text(), re.M)[1]
    cuda = re.match(r"nvidia/cuda:(\d+)\.[\d.]+-devel-ubuntu24\.04$", of("FROM")[0])[1]
    assert {"2.13.0": "13"}[torch] == cuda


def test_it_ends_as_a_user_that_is_not_root():
    names = [name for name, _ in steps()]
    (uid,) = of("USER")
    assert int(uid) > 0 and any(
        f"useradd --create-home --uid {uid} tempflow" in r for r in of("RUN")
    )
    assert "RUN" not in names[names.index("USER") :]


def test_the_bases_python_is_one_that_the_project_supports():
    project = read_configuration(ROOT / "pyproject.toml", expand=False)["project"]
    python = {"24.04": "3.12"}[of("FROM")[0].rpartition("ubuntu")[2]]  # Ubuntu's python3
    assert python in SpecifierSet(project["requires-python"])


def test_deepspeed_is_installed_as_by_make_install():
    """With the same flags, and after torch, which its build imports."""
    there = (ROOT / "scripts/install.sh").read_text()
    flags = re.search(r"^(.*) \$pip install .*(--no-build-isolation deepspeed)$", there, re.M)
    (here,) = (part for run in of("RUN") for part in run.split("&&") if "deepspeed" in part)
    assert here.split()[:2] == flags[1].split() and here.endswith(flags[2])
    text = " ".join(of("RUN"))
    assert text.index("setuptools wheel torch") < text.index(flags[2]) < text.index(".[gpu")
