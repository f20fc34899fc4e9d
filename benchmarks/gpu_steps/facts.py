"""Facts about the machine: the card, the versions, and two speeds with which other steps
compare."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from bench import matmul_peak

from gpu_steps.context import Context
from tempflow.run.environment import device_name, nvidia_driver, versions

PROPERTIES = (
    "total_memory",
    "multi_processor_count",
    "L2_cache_size",
    "clock_rate",
    "memory_clock_rate",
)


def facts(context: Context) -> None:
    """The first step, because the others depend on it."""
    found = {
        "card": device_name(),
        "versions": versions() | {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "cpus": os.cpu_count(),
        "kernels_package": _origin("kernels"),
        "builds_triton_launchers": _builds(),
    }
    context.note(**found, headline=f"{found['card']}, torch {torch.__version__}")
    if context.device.type == "cuda":
        context.note(**_card())
    speed, copied = matmul_peak(context.dtype, context.device), _copy_speed(context)
    speeds = (
        f"{speed / 1e12:.3g} TFLOP/s in {str(context.dtype).removeprefix('torch.')}, copies"
        f" {copied / 1e12:.3g} TB/s"
    )
    context.note(
        matmul_flops_per_s=speed,
        copy_bytes_per_s=copied,
        headline=f"{found['card']}, torch {torch.__version__}: {speeds}",
    )


def _card() -> dict:
    """The card's properties; "missing" for those that the installed CUDA version no longer
    reports."""
    given = torch.cuda.get_device_properties(0)
    return {
        "driver": nvidia_driver(),
        "gpus": torch.cuda.device_count(),
        "capability": torch.cuda.get_device_capability(),
        "properties": {name: getattr(given, name, "missing") for name in PROPERTIES},
        "free_and_total": torch.cuda.mem_get_info(),
    }


def _builds() -> dict[str, bool]:
    """Whether the machine has what Triton's launcher needs at run time."""
    return {
        "compiler": any(shutil.which(name) for name in ("cc", "gcc", "clang")),
        "python_headers": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    }


def _origin(name: str) -> str | None:
    """The file that `import name` would load."""
    found = importlib.util.find_spec(name)
    return found.origin if found else None


def _copy_speed(context: Context) -> float:
    """Bytes per second, read plus written, of the device's own copy."""
    source = torch.randn((1 if context.rehearse else 64) * 2**22, device=context.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / context.seconds(lambda: target.copy_(source))
