"""Copies between host and GPU that do not make the host wait.

An asynchronous copy needs pinned host memory. PyTorch's caching allocator provides it, records the
stream of every such copy, and reuses a block only after its copies are complete. So buffers can be
dropped right after the call, and threads share nothing. On devices other than CUDA, copies are
ordinary ones, and CPU tensors are returned as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

# Bytes. Views of a buffer must be aligned for kernels that load several values at once (16 bytes).
ALIGNED = 64
Named = dict[str, torch.Tensor]


def send(groups: list[Named], device: torch.device | str) -> list[Named]:
    """Copy CPU tensors to a device; to a GPU in a single copy, of which the results are views.

    Args:
        groups: tensors by name, of any shapes and dtypes.
        device: where to.

    Returns:
        The same tensors on `device`.
    """
    if torch.device(device).type != "cuda":
        return [{name: tensor.to(device) for name, tensor in group.items()} for group in groups]
    # One copy of many small tensors: each copy has a fixed cost, whatever its size.
    places, size = _places(groups)
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for group, starts in zip(groups, places, strict=True):
        for name, tensor in group.items():
            _view(staged, starts[name], tensor).copy_(tensor)
    there = staged.to(device, non_blocking=True)
    return [
        {name: _view(there, starts[name], tensor) for name, tensor in group.items()}
        for group, starts in zip(groups, places, strict=True)
    ]


def send_one(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy one CPU tensor to a device, as `send` does."""
    return send([{"": tensor}], device)[0][""]


class Fetched:
    """Tensors that are being copied to the CPU.

    On a GPU the copies start when everything launched before has finished. On other devices they
    are complete at once.

    Args:
        tensors: all on one device.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._done: torch.cuda.Event | None = None
        # On a CPU there is nothing to wait for. Without tensors there is no device for an event.
        if not tensors or tensors[0].device.type != "cuda":
            self._tensors = [tensor.cpu() for tensor in tensors]
            return
        self._tensors = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in tensors
        ]
        # On the stream of the tensors' device: in a lane's thread another device may be current.
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(tensors[0].device))

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._done is None or self._done.query()

    def wait(self) -> list[torch.Tensor]:
        """Wait for the copies and return them, in the order of `tensors`."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


class Mark:
    """A point in a device's work, for measuring time: on a GPU by an event on its stream."""

    def __init__(self, device: torch.device):
        # Without a GPU the host does the work itself, so its clock is right.
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def seconds_to(self, later: Mark) -> float:
        """Seconds from this mark to a later one; the device must have passed both."""
        if self._event is None or later._event is None:
            return later._time - self._time
        return self._event.elapsed_time(later._event) / 1000  # milliseconds


def _places(groups: list[Named]) -> tuple[list[dict[str, int]], int]:
    """The offset of each tensor in a buffer, and the buffer's size, in bytes."""
    places: list[dict[str, int]] = []
    size = 0
    for group in groups:
        places.append({})
        for name, tensor in group.items():
            places[-1][name] = size
            size += math.ceil(tensor.nbytes / ALIGNED) * ALIGNED
    return places, size


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """The part of a buffer from byte `start` on, with shape and dtype of `like`."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
