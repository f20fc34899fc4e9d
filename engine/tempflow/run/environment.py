"""What a measured number depends on besides the code: the device and the versions of the libraries."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions() -> dict[str, str]:
    """Python and the libraries that results depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "diffusers", "transformers", "peft", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def uses_gpu() -> bool:
    """Whether this process computes on a GPU: torch has one, and DS_ACCELERATOR does not ask for the CPU."""
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device_name() -> str:
    """The name of the GPU in use, or the processor's."""
    import torch

    if uses_gpu():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"
