"""The base class of averages of the trained weights. They are fp32 on the CPU, and each weight is
held by one rank.

No process holds all of an average: it is read and written to its file a few weights at a time. The
file is whole and the same for any number of ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Iterable, Iterator

import torch

from tempflow.checkpoints.safetensors_writer import write_together
from tempflow.training import distributed
from tempflow.training.engine import Runtime


class Averaged(ABC):
    """Weights computed from those of many updates, which are evaluated and exported instead of the
    newest ones.

    Args:
        runtime: the training engine.
        every: updates after which the weights are looked at.
    """

    key: ClassVar[str]
    """The key of the `training` section that switches it on. It also names its file and its count
    of updates in a checkpoint."""

    def __init__(self, runtime: Runtime, every: int):
        self._runtime, self.every = runtime, every
        self.updates = 0
        self._shapes = runtime.trainable_shapes()
        self._owner = assign_owners(self._shapes, distributed.world_size())

    @property
    def taken(self) -> bool:
        """Whether at least one average was taken."""
        return self.updates >= self.every

    @abstractmethod
    def _take(self) -> None:
        """Take the current weights into the average (a collective)."""

    @abstractmethod
    def _value(self, name: str) -> torch.Tensor:
        """The average of one weight that this rank holds, fp32."""

    @abstractmethod
    def read(self, file: Path, updates: int) -> None:
        """Restore this rank's share from a file that `write` wrote, on any number of ranks.

        Args:
            file: the file of a checkpoint; not read if no average had been taken.
            updates: the number of updates at that checkpoint.
        """

    @torch.no_grad()
    def update(self) -> None:
        """Call after every optimizer step that changed the weights (a collective)."""
        self.updates += 1
        if self.updates % self.every == 0:
            self._take()

    def gather(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The averages of those of the named weights that are trained, fp32, on every rank's device
        (a collective)."""
        return {name: self._shared(name, self._value) for name in names if name in self._owner}

    def write(self, file: Path) -> None:
        """Write all averages into a safetensors file, on rank 0 (a collective)."""
        # A generator: one average at a time travels to rank 0.
        write_together(
            file, self._shapes, ((name, self.gather([name])[name]) for name in self._shapes)
        )

    def _current(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The current values, fp32, of the trained weights that this rank holds (a collective)."""
        # Every rank walks through all weights: under ZeRO, reading one is a collective.
        for name, parameter in self._runtime.trainable.items():
            value = self._runtime.full_fp32(parameter)
            if self._mine(name):
                yield name, value

    def _mine(self, name: str) -> bool:
        """Whether this rank holds a weight."""
        return self._owner[name] == distributed.rank()

    def _shared(self, name: str, value_of) -> torch.Tensor:
        """value_of(name) of the rank that holds the weight, on every rank's device (a
        collective)."""
        # On the device, because NCCL cannot broadcast tensors of the CPU.
        device = self._runtime.policy.device
        value = (
            value_of(name).to(device)
            if self._mine(name)
            else torch.empty(self._shapes[name], device=device)
        )
        return distributed.broadcast(value, self._owner[name])


def assign_owners(shapes: dict[str, tuple[int, ...]], ranks: int) -> dict[str, int]:
    """The rank that holds each weight. The largest weights are dealt first, each to the rank that
    holds least."""
    # A function of the shapes alone, so all ranks agree, and a checkpoint need not store it.
    held, owner = [0] * ranks, {}
    for name in sorted(shapes, key=lambda name: -torch.Size(shapes[name]).numel()):
        owner[name] = held.index(min(held))
        held[owner[name]] += torch.Size(shapes[name]).numel()
    return owner
