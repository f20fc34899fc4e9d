"""What all averages of the trained weights share: fp32 on the CPU, each weight held by one rank
alone.

Nothing ever holds the whole of it: it is read a few weights at a time, and written to its file so.
The file is whole, the same for any number of ranks.
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
    """Weights made from those that training passes through, evaluated and exported in their
    place."""

    key: ClassVar[str]
    """The key of `training` that asks for it; names its file and its count of updates in a
    checkpoint, too."""

    def __init__(self, runtime: Runtime, every: int):
        """every: updates between two looks at the weights."""
        self._runtime, self.every = runtime, every
        self.updates = 0
        self._shapes = runtime.trainable_shapes()
        self._owner = assign_owners(self._shapes, distributed.world_size())

    @property
    def taken(self) -> bool:
        """Whether it is an average yet."""
        return self.updates >= self.every

    @abstractmethod
    def _take(self) -> None:
        """Look at the weights (a collective)."""

    @abstractmethod
    def _value(self, name: str) -> torch.Tensor:
        """One average that this rank holds, fp32."""

    @abstractmethod
    def read(self, file: Path, updates: int) -> None:
        """Take over this rank's share of what `write` wrote after `updates` updates, on any number
        of ranks, if it wrote one."""

    @torch.no_grad()
    def update(self) -> None:
        """To be called after every optimizer step."""
        self.updates += 1
        if self.updates % self.every == 0:
            self._take()

    def gather(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Those of some weights that are averaged, fp32 on every rank, on its device (a
        collective)."""
        return {name: self._shared(name, self._value) for name in names if name in self._owner}

    def write(self, file: Path) -> None:
        """All averages into a safetensors file, by the first rank (a collective)."""
        write_together(
            file, self._shapes, ((name, self.gather([name])[name]) for name in self._shapes)
        )

    def _current(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained weights of this rank's share; every rank walks through all, since reading one
        is a collective."""
        for name, parameter in self._runtime.trainable.items():
            value = self._runtime.full_fp32(parameter)
            if self._mine(name):
                yield name, value

    def _mine(self, name: str) -> bool:
        """Whether this rank holds a weight."""
        return self._owner[name] == distributed.rank()

    def _shared(self, name: str, value_of) -> torch.Tensor:
        """value_of(name) of the rank that holds it, on every rank and its device (a collective)."""
        device = self._runtime.policy.device
        value = (
            value_of(name).to(device)
            if self._mine(name)
            else torch.empty(self._shapes[name], device=device)
        )
        return distributed.broadcast(value, self._owner[name])


def assign_owners(shapes: dict[str, tuple[int, ...]], ranks: int) -> dict[str, int]:
    """The rank that holds each weight: the largest first, each to whoever holds least."""
    held, owner = [0] * ranks, {}
    for name in sorted(shapes, key=lambda name: -torch.Size(shapes[name]).numel()):
        owner[name] = held.index(min(held))
        held[owner[name]] += torch.Size(shapes[name]).numel()
    return owner
