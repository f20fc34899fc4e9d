"""The sdist and the wheel that a release uploads: built from a copy of the sources, installed in an
environment of their own, and used outside a clone without PYTHONPATH.

Nothing is downloaded: the build backend and the dependencies are those of the tests' environment.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from engine_cases import ROOT, write_config
from run_cases import LAUNCHED, TIMEOUT_S

import tempflow
from tempflow.models.hub import KNOWN

NAME = f"tempflow_grpo-{tempflow.__version__}"
PACKAGES = {"engine/tempflow": "tempflow", "kernels/tempflow_kernels": "tempflow_kernels"}
LEFT_OUT = (".*", "runs", "build", "dist", "site", "*.egg-info", "__pycache__", "embeddings")
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"

pytestmark = pytest.mark.slow


def built(kind: str, source: Path, out: Path) -> None:
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Folder of the sdist, and of the wheel that is built from the sdist, as pip would."""
    top = tmp_path_factory.mktemp("packaging")
    out = top / "dist"
    out.mkdir()
    shutil.copytree(ROOT, top / "clone", ignore=shutil.ignore_patterns(*LEFT_OUT))
    built("sdist", top / "clone", out)
    with tarfile.open(out / f"{NAME}.tar.gz") as archive:
        archive.extractall(top / "unpacked")
    built("wheel", top / "unpacked" / NAME, out)
    return out


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """A virtual environment with the wheel; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "-q"]
    wheel = dist / f"{NAME}-py3-none-any.whl"
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "tests_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(installed: Path, cwd: Path, script: str, *arguments: str) -> str:
    """Standard output of one of the environment's commands."""
    env = {k: v for k, v in os.environ.items() if k not in (*LAUNCHED, "PYTHONPATH")}
    env |= {"PATH": f"{installed / 'bin'}{os.pathsep}{env['PATH']}", "DS_ACCELERATOR": "cpu"}
    command = [installed / "bin" / script, *arguments]
    found = subprocess.run(
        command, cwd=cwd, env=env, text=True, capture_output=True, timeout=TIMEOUT_S
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def assets(installed: Path) -> Path:
    (site,) = installed.glob("lib/python3*/site-packages")
    return site / "tempflow/assets"


def own_config(installed: Path, folder: Path, text: str) -> Path:
    """A config with the assets of the installed package in place of the clone's."""
    for clone in (f"{ROOT}/engine/tempflow/assets", "engine/tempflow/assets"):
        text = text.replace(clone, str(assets(installed)))
    assert str(ROOT) not in text
    file = folder / "own.json"
    file.write_text(text)
    return file


def source_files(package: str) -> set[str]:
    source = ROOT / package
    files = (file for file in source.rglob("*") if file.is_file())
    return {
        f"{PACKAGES[package]}/{file.relative_to(source)}"
        for file in files
        if "__pycache__" not in file.parts
    }


def test_a_wheel_has_all_that_the_packages_read(dist):
    """The model cards, the tiny model, the report's page, and every module; and nothing else."""
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as archive:
        held = {name for name in archive.namelist() if not name.startswith(NAME)}
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert held == set().union(*map(source_files, PACKAGES)) and len(licenses) == 1
    assert {f"tempflow/assets/cards/{c}/transformer/config.json" for c in KNOWN.values()} <= held


def test_an_sdist_has_what_a_reader_of_the_project_needs(dist):
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    documents = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
    commands = {"Makefile", "constraints.txt", "constraints-gpu.txt", "scripts/install.sh"}
    work = {"configs/tiny_ocr.json", "engine/train.py", "docs/config.md", "tests/conftest.py"}
    assert documents | commands | work | {"examples/own_parts.json"} <= held
    assert not [name for name in held if "__pycache__" in name or name.endswith(".pyc")]


def test_the_installed_version_is_the_stated_one(installed, tmp_path):
    code = (
        "import json, tempflow, tempflow_kernels, importlib.metadata as m;"
        "print(json.dumps([tempflow.__version__, m.version('tempflow-grpo'),"
        " tempflow.__file__, tempflow_kernels.__file__]))"
    )
    stated, recorded, *files = json.loads(run(installed, tmp_path, "python", "-c", code))
    assert stated == recorded == tempflow.__version__
    assert all(Path(file).is_relative_to(installed) for file in files)


@pytest.mark.parametrize("command", ["evaluate", "export", "merge", "refine"])
def test_commands_start(installed, tmp_path, command):
    """`train` and `sample` are run below."""
    assert "usage:" in run(installed, tmp_path, f"tempflow-{command}", "--help")


def test_a_model_card_is_enough_for_a_dry_run(installed, tmp_path):
    text = (ROOT / "configs/flux_first.json").read_text()
    config = own_config(installed, tmp_path, text)
    shown = run(installed, tmp_path, "tempflow-train", "--config", str(config), "--dry-run")
    assert "black-forest-labs/FLUX.1-dev" in shown and "GB" in shown


def test_the_shipped_model_is_trained_and_sampled(installed, tmp_path):
    small = {
        "rewards": {"jpeg": 1.0},
        "data": {"prompts_per_iteration": 1},
        "rollout": {"num_steps": 2, "plan": {"type": "tempflow", "seeds": 1, "branch_steps": [0]}},
        "training": {"iterations": 1},
        "eval": {"every": 1, "prompts": 2},
        "checkpoint": {"every": 1},
        "logging": {"dir": str(tmp_path / "runs"), "name": "own"},
    }
    config = own_config(installed, tmp_path, write_config(tmp_path, **small).read_text())
    run(installed, tmp_path, "tempflow-train", "--config", str(config))
    folders = "--run", str(tmp_path / "runs/own"), "--out", str(tmp_path / "samples")
    run(installed, tmp_path, "tempflow-sample", *folders, "--count", "2", "--num-steps", "2")
    assert (tmp_path / "samples/all.png").stat().st_size > 0
