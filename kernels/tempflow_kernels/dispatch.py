"""Chooses the implementation that runs: TEMPFLOW_KERNELS = auto | reference | triton.

"auto" runs Triton for CUDA (and ROCm) tensors and the PyTorch reference for all others. A path that
cannot run raises an error with the reason; there is no silent fallback to the reference, which on a
GPU would be slow and would hide a broken installation.
"""

import functools
import importlib.util
import os

CHOICES = ("auto", "reference", "triton")


def use_triton(device):
    """Whether ops on tensors of this device run their Triton kernels.

    Raises:
        ValueError: TEMPFLOW_KERNELS has another value.
        RuntimeError: the chosen path cannot run here.
    """
    # Read on every call, so that a test or a benchmark can switch paths within one process.
    choice = os.environ.get("TEMPFLOW_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"TEMPFLOW_KERNELS={choice!r}: expected one of {', '.join(CHOICES)}")
    if choice == "reference" or (choice == "auto" and device.type != "cuda"):
        return False
    # By device type, not by device: the cache below then holds one entry for all GPUs.
    reason = why_not_triton(device.type)
    if reason:
        raise RuntimeError(
            f"TEMPFLOW_KERNELS={choice}: the Triton kernels cannot run on {device}: {reason}"
        )
    return True


@functools.cache  # ops ask on every call, and the answer holds for the whole process
def why_not_triton(device_type):
    """The reason why Triton cannot run on such a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return (
            "the package triton is not installed (pip install triton, or set"
            " TEMPFLOW_KERNELS=reference)"
        )
    # Imported here, not above: a CPU installation works without Triton.
    import triton.language
    from triton.runtime.jit import JITFunction

    interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
    # @triton.jit reads the variable when it decorates. If Triton's own library was decorated
    # without it, interpreted kernels fail deep inside Triton.
    if interpreting and isinstance(triton.language.zeros_like, JITFunction):
        return (
            "TRITON_INTERPRET was set after triton had been imported; set it before Python starts"
        )
    if device_type != "cuda" and not interpreting:
        return (
            "this device is not a GPU, and TRITON_INTERPRET=1 is not set (it must be, before Python"
            " starts)"
        )
    return None
