"""The machine that a run computes on: versions of the libraries, the device, and an error where
there is a GPU that cannot be used.

Without that error a GPU behind too old a driver would turn into a run on the CPU: torch reports no
GPU, and every library falls back.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tempflow
from tempflow.errors import UserError

# Set by torchrun and the deepspeed launcher for each rank.
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROC = Path("/proc/driver/nvidia")
# Oldest driver by the major version of CUDA, from NVIDIA's release notes.
OLDEST_DRIVER = {"12": "525", "13": "580"}
INSTEAD = "DS_ACCELERATOR=cpu before the command runs it on the CPU all the same"


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the libraries that results depend on, by name;
    libraries that are not installed are left out."""
    found = {"tempflow": tempflow.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "diffusers", "transformers", "peft", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def uses_gpu() -> bool:
    """Whether this process computes on a GPU: torch has one, and DS_ACCELERATOR does not ask for
    the CPU."""
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device_name() -> str:
    """The name of the GPU in use, or the processor's."""
    import torch

    if uses_gpu():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


@lru_cache(maxsize=1)
def nvidia_driver() -> str | None:
    """The version of this machine's NVIDIA driver; "of unknown version" where the driver does not
    answer; None where there is no driver."""
    # Cached: the check at the start and the line about the device both ask, by a process.
    if (PROC / "version").exists():
        found = re.search(r"Module\D.*?\s(\d+\.[\d.]+)", (PROC / "version").read_text())
        return found[1] if found else "of unknown version"
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired) as error:
        # In a container nvidia-smi may be missing although the driver is there.
        return (
            None
            if isinstance(error, FileNotFoundError) and not PROC.exists()
            else "of unknown version"
        )
    return answer[0] if answer and re.fullmatch(r"\d+\.[\d.]+", answer[0]) else "of unknown version"


def unused_gpu() -> str | None:
    """The driver's version where this machine has an NVIDIA driver but torch has no GPU to use.

    None where torch has a GPU, and where CUDA_VISIBLE_DEVICES hides the GPUs on purpose.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    # A ROCm build of torch has no business with an NVIDIA driver that the machine may also have.
    return None if torch.cuda.is_available() or torch.version.hip or hidden else nvidia_driver()


def prefer_cpu() -> None:
    """Make DeepSpeed use the CPU where torch has no GPU, except where `check_gpu` will refuse to
    run on the CPU."""
    import torch

    if not torch.cuda.is_available() and not (torch.version.cuda and unused_gpu()):
        # A user's own choice in the environment is kept.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def check_gpu() -> None:
    """Refuse to run where torch is built for CUDA but cannot use the GPU of this machine.

    Raises:
        UserError: with the driver, what torch needs, and what to do; never with
            DS_ACCELERATOR=cpu.
    """
    import torch

    driver = (
        unused_gpu() if torch.version.cuda and os.environ.get("DS_ACCELERATOR") != "cpu" else None
    )
    if driver is None:
        return
    oldest = OLDEST_DRIVER.get(str(torch.version.cuda).partition(".")[0])
    needs = f", which needs driver {oldest} or later" if oldest else ""
    raise UserError(
        f"no usable GPU: the NVIDIA driver is {driver}, torch {torch.__version__} is built for CUDA"
        f" {torch.version.cuda}{needs} ({_reason()}). Update the driver, install a torch for an"
        f" older CUDA, or give the container or the job its GPUs; {INSTEAD}"
    )


def _reason() -> str:
    """Why torch uses no GPU, in torch's own words."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # of any type: it comes from the driver
        return " ".join(str(error).split()) or type(error).__name__
    return "torch.cuda.is_available() is false"


def describe(processes: int = 1) -> str:
    """One line for the start of a run: the device of this process, and the number of processes."""
    import torch

    ranks = f"; {processes} processes" if processes > 1 else ""
    if uses_gpu():
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        cuda = (
            f"CUDA {torch.version.cuda}, driver {nvidia_driver()}"
            if torch.version.cuda
            else f"ROCm {torch.version.hip}"
        )
        return f"device: {device_name()}, {memory / 1e9:.0f} GB, {cuda}{ranks}"
    driver = None if torch.cuda.is_available() else unused_gpu()
    if driver and not torch.version.cuda:
        why = (
            f"; this machine has an NVIDIA driver ({driver}), but torch {torch.__version__} is"
            " built without CUDA: make clean, then make install, takes the CUDA build"
        )
    else:
        why = (
            "; DS_ACCELERATOR=cpu leaves the GPU alone"
            if driver or torch.cuda.is_available()
            else ""
        )
    return f"device: CPU, {device_name()}{ranks}{why}"


def choose_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"; the device is printed on stderr.

    Raises:
        UserError: where there is a GPU that cannot be used.
    """
    check_gpu()
    # stderr: standard output is the result of some commands.
    print(describe(), file=sys.stderr, flush=True)
    return "cuda" if uses_gpu() else "cpu"
