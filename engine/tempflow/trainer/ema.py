"""Exponential moving average of the trained weights, fp32 on the CPU, each weight held by one rank."""

from __future__ import annotations

from typing import Iterator

import torch

from tempflow.trainer import comm
from tempflow.trainer.runtime import Runtime


class Average:
    """mean <- decay mean + (1 - decay) weights, every `every` updates; starts as a copy of the weights."""

    def __init__(self, runtime: Runtime, decay: float, every: int):
        self._runtime, self._decay, self._every = runtime, decay, every
        self.updates = 0
        self._mine: dict[str, torch.Tensor] = {}
        for name, value in self._current():
            self._mine[name] = value.cpu().clone()

    def _owner(self, index: int) -> int:
        return index % comm.world_size()

    def _current(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained weights this rank averages; every rank walks through all, since reading one is a collective."""
        for index, (name, parameter) in enumerate(self._runtime.trainable.items()):
            value = self._runtime.full_fp32(parameter)
            if self._owner(index) == comm.rank():
                yield name, value

    @torch.no_grad()
    def update(self) -> None:
        """To be called after every optimizer step."""
        self.updates += 1
        if self.updates % self._every == 0:
            for name, value in self._current():
                self._mine[name].lerp_(value.cpu(), 1 - self._decay)

    def whole(self) -> dict[str, torch.Tensor]:
        """All averaged weights on every rank (a collective)."""
        weights = {}
        device = next(iter(self._runtime.trainable.values())).device
        for index, (name, parameter) in enumerate(self._runtime.trainable.items()):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            mine = self._mine.get(name)
            value = torch.empty(shape) if mine is None else mine
            weights[name] = comm.broadcast(value.to(device), self._owner(index)).cpu()
        return weights

    def load(self, weights: dict[str, torch.Tensor], updates: int) -> None:
        """Take over averages that `whole` returned."""
        self.updates = updates
        self._mine = {name: weights[name].float().clone() for name in self._mine}
