"""Exponential moving average of the trained weights, fp32 on the CPU, each weight held by one rank alone.

Nothing ever holds the whole of it: it is read a few weights at a time, and written to its file so. The file is whole, the same
for any number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Iterator

import torch
from safetensors import safe_open

from tempflow.checkpoints.safetensors_writer import write_together
from tempflow.training import distributed
from tempflow.training.engine import Runtime


class Average:
    """mean <- decay mean + (1 - decay) weights, every `every` updates; starts as a copy of the weights."""

    def __init__(self, runtime: Runtime, decay: float, every: int):
        self._runtime, self._decay, self.every = runtime, decay, every
        self.updates = 0
        self._shapes = runtime.trainable_shapes()
        self._owner = assign_owners(self._shapes, distributed.world_size())
        self._mine: dict[str, torch.Tensor] = {}
        for name, value in self._current():
            self._mine[name] = value.cpu().clone()

    @property
    def taken(self) -> bool:
        """Whether it is an average yet; until the first one it holds the weights before training."""
        return self.updates >= self.every

    def _current(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained weights this rank averages; every rank walks through all, since reading one is a collective."""
        for name, parameter in self._runtime.trainable.items():
            value = self._runtime.full_fp32(parameter)
            if self._owner[name] == distributed.rank():
                yield name, value

    @torch.no_grad()
    def update(self) -> None:
        """To be called after every optimizer step."""
        self.updates += 1
        if self.updates % self.every == 0:
            for name, value in self._current():
                self._mine[name].lerp_(value.cpu(), 1 - self._decay)

    def gather(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Those of some weights that are averaged, fp32 on every rank, on its device (a collective)."""
        device = self._runtime.policy.device
        found = {}
        for name in (name for name in names if name in self._owner):
            mine = self._mine.get(name)
            value = torch.empty(self._shapes[name], device=device) if mine is None else mine.to(device)
            found[name] = distributed.broadcast(value, self._owner[name])
        return found

    def write(self, file: Path) -> None:
        """All averages into a safetensors file, by the first rank (a collective)."""
        write_together(file, self._shapes, ((name, self.gather([name])[name]) for name in self._shapes))

    def read(self, file: Path, updates: int) -> None:
        """Take over this rank's share of averages that `write` wrote on any number of ranks, if one was taken."""
        self.updates = updates
        if not self.taken:
            return
        with safe_open(file, "pt") as averages:
            self._mine = {name: averages.get_tensor(name).float() for name in self._mine}


def assign_owners(shapes: dict[str, tuple[int, ...]], ranks: int) -> dict[str, int]:
    """The rank that holds each weight: the largest first, each to whoever holds least."""
    held, owner = [0] * ranks, {}
    for name in sorted(shapes, key=lambda name: -torch.Size(shapes[name]).numel()):
        owner[name] = held.index(min(held))
        held[owner[name]] += torch.Size(shapes[name]).numel()
    return owner
