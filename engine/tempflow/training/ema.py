"""Exponential moving average of the trained weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from tempflow.training.averaged import Averaged
from tempflow.training.engine import Runtime


class Average(Averaged):
    """mean <- decay mean + (1 - decay) weights, after every `every` updates.

    Args:
        runtime: the training engine.
        decay: the factor of the mean.
        every: updates between two averages.
    """

    key = "ema"

    def __init__(self, runtime: Runtime, decay: float, every: int):
        super().__init__(runtime, every)
        self._decay = decay
        # It starts as the weights before training, and holds only these until the first average.
        self._means: dict[str, torch.Tensor] = {
            # On a CPU `cpu()` is no copy, and the value may be the parameter's own storage.
            name: value.cpu().clone()
            for name, value in self._current()
        }

    def _take(self) -> None:
        for name, value in self._current():
            self._means[name].lerp_(value.cpu(), 1 - self._decay)

    def _value(self, name: str) -> torch.Tensor:
        return self._means[name]

    def read(self, file: Path, updates: int) -> None:
        self.updates = updates
        if not self.taken:
            return
        with safe_open(file, "pt") as averages:
            self._means = {name: averages.get_tensor(name).float() for name in self._means}
