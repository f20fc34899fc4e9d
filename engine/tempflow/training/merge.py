"""Merging in place of a learning-rate decay: a weighted sum of the last snapshots of the trained
weights.

Under a constant learning rate, sum_j c_j theta_j over the snapshots theta_1 .. theta_n equals a run
whose update i was scaled by w_i = sum_{j >= i} c_j: a decay after the fact, which can be had at any
moment and needs no planned end (WSM, arXiv 2507.17634).
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Callable

import torch
from safetensors import safe_open

from tempflow.checkpoints.safetensors_writer import write_together
from tempflow.training.averaged import Averaged
from tempflow.training.engine import Runtime

DECAYS: dict[
    str, Callable[[float], float]
] = {  # w of the share u in [0, 1) of the window that lies before an update
    "sqrt": lambda u: 1 - math.sqrt(u),
    "mean": lambda u: 1 - u,  # equal weights, which are
    "linear": lambda u: 1 - u,  # those of a linear decay
}


def coefficients(shape: str, n: int) -> list[float]:
    """c_1 .. c_n of n snapshots, the oldest first: c_j = w_j - w_{j+1} with w_i = decay((i - 1) /
    n) and w_{n+1} = 0. Their sum is 1.

    What was trained before the window keeps its size: c_0 = 1 - w_1 is 0 for every shape, so no
    snapshot of it is needed.
    """
    w = [DECAYS[shape](i / n) for i in range(n)] + [0.0]
    return [a - b for a, b in zip(w, w[1:])]


class Merge(Averaged):
    """The weighted sum of the last n snapshots of the weights; of those that there are while they
    are fewer.

    Args:
        runtime: whose trained weights.
        last: n, snapshots kept.
        every: updates between two snapshots.
        shape: a key of `DECAYS`, the decay that the sum stands for.
    """

    key = "merge"

    def __init__(self, runtime: Runtime, last: int, every: int, shape: str):
        super().__init__(runtime, every)
        self._shape = shape
        self._snapshots: deque[dict[str, torch.Tensor]] = deque(maxlen=last)

    def _take(self) -> None:
        if len(self._snapshots) == self._snapshots.maxlen:
            self._snapshots.popleft()  # before its successor needs room
        self._snapshots.append({name: value.cpu().clone() for name, value in self._current()})

    def _value(self, name: str) -> torch.Tensor:
        """Summed in float64, so that equal snapshots give themselves."""
        found = torch.zeros(self._shapes[name], dtype=torch.float64)
        for c, snapshot in zip(
            coefficients(self._shape, len(self._snapshots)), self._snapshots, strict=True
        ):
            found.add_(snapshot[name], alpha=c)
        return found.float()

    def write(self, file: Path) -> None:
        """The sum into `file`, and beside it the snapshots, from which a resumed run goes on (a
        collective)."""
        super().write(file)
        names = {
            f"{j}.{name}": (snapshot, name)
            for j, snapshot in enumerate(self._snapshots)
            for name in self._shapes
        }
        shapes = {key: self._shapes[name] for key, (_, name) in names.items()}
        write_together(
            snapshots_of(file),
            shapes,
            ((key, self._shared(name, held.get)) for key, (held, name) in names.items()),
        )

    def read(self, file: Path, updates: int) -> None:
        self.updates = updates
        self._snapshots.clear()
        if not self.taken:
            return
        mine = [name for name in self._shapes if self._mine(name)]
        with safe_open(snapshots_of(file), "pt") as held:
            count = 1 + max(int(key.partition(".")[0]) for key in held.keys())
            for j in range(count)[-(self._snapshots.maxlen or 0) :]:
                self._snapshots.append({name: held.get_tensor(f"{j}.{name}") for name in mine})


def snapshots_of(file: Path) -> Path:
    """Where the snapshots of a merge's file lie: tensors named "j.weight", the oldest being j =
    0."""
    return file.with_name("snapshots.safetensors")
