"""Both implementations under one set of tests: the reference on the CPU, and the Triton kernels on
the GPU if there is one, else in Triton's interpreter (which has to be chosen before triton is first
imported)."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["reference", "triton"])
def device(request, monkeypatch):
    """The device of a test that runs on either implementation; the implementation is forced."""
    monkeypatch.setenv("TEMPFLOW_KERNELS", request.param)
    return torch.device(
        "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    )


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that the package allocates without filling it holds NaN, so that a forgotten element
    shows."""

    def poisoned(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            ours = sys._getframe(1).f_globals.get("__name__", "").startswith("tempflow_kernels")
            return tensor.fill_(float("nan")) if ours and tensor.is_floating_point() else tensor

        return allocate_nan

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
