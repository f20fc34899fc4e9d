"""`make install` on a machine with a GPU's driver and nothing else of CUDA, where what it would
fetch is not fetched."""

import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.utils.cpp_extension
from engine_cases import ROOT
from setuptools.config.pyprojecttoml import read_configuration

MAKE = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def made(tmp_path, smi):
    """What `make install` would run where nvidia-smi answers as `smi` does."""
    executable(tmp_path / "bin/nvidia-smi", smi)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "-n", "-C", ROOT, "install", f"VENV={tmp_path / 'venv'}"]
    return subprocess.run(command, env=env, text=True, capture_output=True).stdout


@MAKE
@pytest.mark.parametrize(
    "smi, constraints",
    [
        ("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'", "constraints-gpu.txt"),
        ("exit 9", "constraints.txt"),
    ],
)
def test_a_driver_that_lists_a_gpu_decides(tmp_path, smi, constraints):
    assert f"scripts/install.sh {tmp_path / 'venv'} {constraints}\n" in made(tmp_path, smi)


def steps(tmp_path, constraints):
    """(arguments of pip, DS_ variables) of each step of the installation; the environment's Python
    writes them down."""
    log = tmp_path / "steps"
    executable(
        tmp_path / "venv/bin/python",
        f'[ "$2" = pip ] && echo "$@ | $(env | grep ^DS_ | sort | tr "\\n" " ")" >> {log}; exit 0',
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    subprocess.run(
        [ROOT / "scripts/install.sh", tmp_path / "venv", constraints],
        env={**env, "PYTHON": sys.executable},
        check=True,
    )
    lines = [line.split(" | ") for line in log.read_text().splitlines()]
    return [
        (arguments, dict(pair.split("=") for pair in variables.split()))
        for arguments, variables in lines
    ]


def cuda_builders():
    """Every op of DeepSpeed for CUDA; its setup.py asks each one whether it could be built."""
    import deepspeed.ops.op_builder as package

    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg and module.name not in ("builder", "all_ops"):
            found = importlib.import_module(f"{package.__name__}.{module.name}")
            yield from (
                kind
                for name, kind in vars(found).items()
                if name.endswith("Builder")
                and inspect.isclass(kind)
                and kind.__module__ == found.__name__
                and "NAME" in vars(kind)
            )


@pytest.fixture
def driver_alone(monkeypatch):
    """An H100 that torch can use, and no CUDA toolkit."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    card = type("Card", (), {"major": 9, "minor": 0})
    for name, value in {
        "is_available": True,
        "get_device_properties": card,
        "device_count": 1,
        "current_device": 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.delenv("DS_IGNORE_CUDA_DETECTION", raising=False)


def test_deepspeed_installs_without_the_toolkit(tmp_path, monkeypatch, driver_alone, capsys):
    (variables,) = [
        variables
        for arguments, variables in steps(tmp_path, "constraints-gpu.txt")
        if arguments.endswith(" deepspeed")
    ]
    assert variables["DS_BUILD_OPS"] == "0"
    builders = [kind() for kind in cuda_builders()]
    assert len(builders) > 15
    with pytest.raises(Exception, match="CUDA_HOME does not exist"):
        [builder.is_compatible() for builder in builders]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert all(builder.is_compatible() in (True, False) for builder in builders)


def extras():
    return read_configuration(ROOT / "pyproject.toml")["project"]["optional-dependencies"]


def test_a_gpu_machine_gets_the_gpu_extra_and_others_do_not(tmp_path):
    assert any(
        "-e .[dev,gpu]" in arguments for arguments, _ in steps(tmp_path, "constraints-gpu.txt")
    )
    assert any("-e .[dev]" in arguments for arguments, _ in steps(tmp_path, "constraints.txt"))


def test_the_gpu_extra_needs_no_compiler():
    """flash-attn has no wheel; it has an extra of its own. The rest is pinned where torch does not
    bring it."""
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints-gpu.txt").read_text(), re.M))
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in extras()["gpu"]}
    assert "flash-attn" not in names and names - {"triton"} <= pinned
    assert [re.match(r"[\w-]+", requirement)[0] for requirement in extras()["flash"]] == [
        "flash-attn"
    ]
