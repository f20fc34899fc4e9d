"""Copies between host and GPU that the host does not wait for.

A copy that is asynchronous needs pinned host memory. It comes from PyTorch's caching allocator,
which notes the stream of every such copy, and gives a block out again only when the copies of it
are complete; so nothing here is kept or reused, and threads share nothing. Devices other than CUDA
ones are copied to in the ordinary way, and tensors of the CPU stay what they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

ALIGNED = 64  # bytes: what kernels that load several values at once ask for, and more
Named = dict[str, torch.Tensor]


def send(groups: list[Named], device: torch.device | str) -> list[Named]:
    """Tensors of the CPU on a device: on a GPU by one copy of one pinned buffer, of which they are
    then views.

    groups: tensors by name, of any shapes and dtypes. Returns the same on `device`.
    """
    if torch.device(device).type != "cuda":
        return [{name: tensor.to(device) for name, tensor in group.items()} for group in groups]
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
    """`send` of one tensor."""
    return send([{"": tensor}], device)[0][""]


class Fetched:
    """Tensors on their way to the CPU, from where this was made: copies into pinned memory, behind
    whatever the GPU was given before. Other devices' are there at once."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._done: torch.cuda.Event | None = None
        if not tensors or tensors[0].device.type != "cuda":
            self._tensors = [tensor.cpu() for tensor in tensors]
            return
        self._tensors = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in tensors
        ]
        # of the tensors' device: in a thread the current one may be another
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(tensors[0].device))

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._done is None or self._done.query()

    def wait(self) -> list[torch.Tensor]:
        """The tensors, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


class Mark:
    """A moment in a device's work: on a GPU when it gets there, not when the host does."""

    def __init__(self, device: torch.device):
        self._time = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def seconds_to(self, later: Mark) -> float:
        """Between two moments that have passed."""
        if self._event is None or later._event is None:
            return later._time - self._time
        return self._event.elapsed_time(later._event) / 1000


def _places(groups: list[Named]) -> tuple[list[dict[str, int]], int]:
    """Where each tensor begins in a buffer, and how long that is, in bytes."""
    places: list[dict[str, int]] = []
    size = 0
    for group in groups:
        places.append({})
        for name, tensor in group.items():
            places[-1][name] = size
            size += math.ceil(tensor.nbytes / ALIGNED) * ALIGNED
    return places, size


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """The part of a buffer that holds what `like` does."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
