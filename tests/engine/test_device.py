"""Which device a run takes, and what it says of it, with CUDA, the driver and NCCL stood in for."""

import os
from contextlib import nullcontext
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from engine_cases import small_config, write_config
from run_cases import script_here

from tempflow import cli
from tempflow.errors import UserError
from tempflow.run import environment
from tempflow.run.directory import claim_run
from tempflow.training import device, distributed

OLD = "The NVIDIA driver on your system is too old (found version 12020)."


# -------------------------------------------------------------------------- of a rank among several
def test_the_gpu_is_chosen_before_the_first_collective(monkeypatch, tmp_path):
    """Rank 3 of 8: NCCL's object collectives take the current device, and refuse another one than
    the rank's own."""
    events = []
    for name, value in {
        "RANK": "3",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device, "uses_gpu", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda chosen: events.append(("device", torch.device(chosen).index)),
    )
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **how: events.append("group"))
    for name, value in {
        "is_initialized": True,
        "get_rank": 3,
        "get_world_size": 8,
        "get_backend": "gloo",
    }.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    for name in ("broadcast_object_list", "all_reduce", "gather_object"):
        monkeypatch.setattr(dist, name, lambda *given, name=name: events.append(name))
    config = small_config(logging={"dir": str(tmp_path), "name": "run"})
    (tmp_path / "run").mkdir()
    with claim_run(config, resume=False):
        pass
    assert events[:2] == [("device", 3), "group"] and "broadcast_object_list" in events[2:]


def test_a_rank_without_a_gpu_chooses_none(monkeypatch):
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **how: None)
    monkeypatch.setattr(device, "uses_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: pytest.fail("there is no GPU"))
    with mock.patch.dict(os.environ):
        os.environ.pop("RANK", None)
        distributed.init_distributed()
    assert device.device() == torch.device("cpu")


# ------------------------------------------------------------------------------- a GPU out of reach
@pytest.fixture
def gpu_machine(monkeypatch, tmp_path):
    """A machine with an NVIDIA driver whose GPU torch cannot use; torch is built for CUDA 13 or for
    none."""

    def make(
        built_for="13.0",
        version="NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
    ):
        if version is not None:
            (tmp_path / "version").write_text(version + "\nGCC version:  gcc 12\n")
        monkeypatch.setattr(
            environment, "PROC", tmp_path if version is not None else tmp_path / "none"
        )
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError(OLD)))
        for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.setenv(name, "")  # so that what is set later is taken back, too
            monkeypatch.delenv(name)

    environment.nvidia_driver.cache_clear()
    yield make
    environment.nvidia_driver.cache_clear()


def smi(tmp_path, monkeypatch, answer):
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    "version, driver",
    [
        (
            (
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15"
                " UTC 2023"
            ),
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54  Release Build",
            "550.54",
        ),
        ("something else", "of unknown version"),
    ],
)
def test_the_error_names_driver_and_cuda(gpu_machine, version, driver):
    gpu_machine(version=version)
    with pytest.raises(UserError) as refused:
        environment.check_gpu()
    words = ["no usable GPU", driver, "CUDA 13.0", "580 or later", OLD, "DS_ACCELERATOR=cpu"]
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    "answer, driver",
    [
        ("echo 535.104.05; echo 535.104.05", "535.104.05"),
        ("echo failed; exit 9", "of unknown version"),
    ],
)
def test_nvidia_smi_is_asked_where_the_kernel_says_nothing(
    gpu_machine, tmp_path, monkeypatch, answer, driver
):
    smi(tmp_path, monkeypatch, answer)
    gpu_machine(version=None)
    with pytest.raises(UserError, match=f"driver is {driver}"):
        environment.check_gpu()


@pytest.mark.parametrize(
    "variable, value",
    [("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")],
)
def test_who_asks_for_the_cpu_gets_it(gpu_machine, monkeypatch, variable, value):
    gpu_machine()
    monkeypatch.setenv(variable, value)
    environment.check_gpu()
    environment.prefer_cpu()
    assert environment.uses_gpu() is False and environment.describe().startswith("device: CPU, ")


def test_a_run_ends_before_it_begins(gpu_machine, monkeypatch, tmp_path):
    """Not as a silent run on the CPU: status 2, no run directory, and DeepSpeed was not told to
    take the CPU."""
    gpu_machine()
    monkeypatch.setattr("run_cases.on_cpu", nullcontext)  # as a user starts it, pinned to nothing
    config = write_config(tmp_path, logging={"dir": str(tmp_path / "runs")})
    done = script_here("train", "--config", config)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: no usable GPU: the NVIDIA driver is 535.104.05"
    ), done.stderr
    assert not (tmp_path / "runs").exists() and "DS_ACCELERATOR" not in os.environ


def test_a_dry_run_needs_no_gpu(gpu_machine, tmp_path):
    gpu_machine()
    done = script_here("train", "--config", write_config(tmp_path), "--dry-run")
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------- what is said
def test_a_cpu_build_on_a_gpu_machine_says_so(gpu_machine):
    gpu_machine(built_for=None)
    environment.check_gpu()
    line = environment.describe(2)
    assert line.startswith(
        f"device: CPU, {environment.device_name()}; 2 processes; this machine has an NVIDIA driver"
        " (535.104.05)"
    )
    assert "built without CUDA" in line and "make install" in line and "\n" not in line


def test_a_machine_without_a_gpu_says_no_more_than_that(gpu_machine, monkeypatch):
    gpu_machine(version=None)
    monkeypatch.setenv("PATH", "")
    environment.check_gpu()
    environment.prefer_cpu()
    assert (
        environment.describe() == f"device: CPU, {environment.device_name()}"
        and os.environ["DS_ACCELERATOR"] == "cpu"
    )


def test_a_gpu_is_named_with_its_memory_and_driver(gpu_machine, monkeypatch):
    gpu_machine()
    card = type("Card", (), {"total_memory": 85_000_000_000})
    for name, value in {
        "is_available": True,
        "get_device_name": "CARD",
        "get_device_properties": card,
        "current_device": 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    assert (
        environment.describe(8) == "device: CARD, 85 GB, CUDA 13.0, driver 535.104.05; 8 processes"
    )
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (
        environment.describe()
        == f"device: CPU, {environment.device_name()}; DS_ACCELERATOR=cpu leaves the GPU alone"
    )


# ------------------------------------------------------------------------------------ the allocator
@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, None),
    ],
)
def test_memory_grows_in_place_unless_the_user_says_otherwise(monkeypatch, given, expected):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
        if name in given:
            monkeypatch.setenv(name, given[name])
    with monkeypatch.context() as here:
        # what the libraries are told is none of the other tests' business
        here.setattr(os, "environ", os.environ.copy())
        cli.quiet_libraries()
        assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
