"""Merging snapshots instead of decaying the learning rate: a weighted sum of the last snapshots of
the trained weights.

Under a constant learning rate, sum_j c_j theta_j over the snapshots theta_1 .. theta_n equals the
weights of a run whose update i was scaled by w_i = sum_{j >= i} c_j. So a decay is applied after
the fact, at any moment, and the end of the run need not be planned (WSM, arXiv 2507.17634).

With a scale s above 1 the sum is taken s times as far from the weights before training, theta_0 +
s (sum - theta_0) (ExPO, arXiv 2404.16792): in the sum the noise of single updates has canceled, so
most of what is left is the direction in which all of them agree.
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

# The weight w of an update, as a function of u in [0, 1), the share of the window that lies before
# it. Equal weights of the snapshots ("mean") are those of a linear decay, hence two names.
DECAYS: dict[str, Callable[[float], float]] = {
    "sqrt": lambda u: 1 - math.sqrt(u),
    "mean": lambda u: 1 - u,
    "linear": lambda u: 1 - u,
}


def coefficients(shape: str, n: int) -> list[float]:
    """c_1 .. c_n of n snapshots, the oldest first; their sum is 1.

    c_j = w_j - w_{j+1} with w_i = decay((i - 1) / n) and w_{n+1} = 0.
    """
    # Updates before the window are not scaled: w_1 is 1 for every shape, so the weights before the
    # window have coefficient 0 and need no snapshot.
    w = [DECAYS[shape](i / n) for i in range(n)] + [0.0]
    return [a - b for a, b in zip(w, w[1:])]


class Merge(Averaged):
    """The weighted sum of the last n snapshots of the weights, or of all snapshots while there are
    fewer.

    Args:
        runtime: the training engine.
        last: n, the number of snapshots that are kept.
        every: updates between two snapshots.
        shape: a key of `DECAYS`, the decay that the sum is equivalent to.
        scale: s. The weights are then those before training; a checkpoint is read later. Of an
            adapter B A the factor B alone is scaled, and so the product.
    """

    key = "merge"

    def __init__(self, runtime: Runtime, last: int, every: int, shape: str, scale: float = 1.0):
        super().__init__(runtime, every)
        self._shape, self._scale = shape, scale
        self._snapshots: deque[dict[str, torch.Tensor]] = deque(maxlen=last)
        # The weights before training, of what is scaled.
        self._base = (
            {}
            if scale == 1
            else {
                name: value.cpu().clone()
                for name, value in self._current()
                if ".lora_A." not in name
            }
        )

    def _take(self) -> None:
        if len(self._snapshots) == self._snapshots.maxlen:
            self._snapshots.popleft()  # first, so that never n + 1 snapshots are in memory
        self._snapshots.append({name: value.cpu().clone() for name, value in self._current()})

    def _value(self, name: str) -> torch.Tensor:
        # In float64, so that the sum of equal snapshots is that snapshot to the bit.
        found = torch.zeros(self._shapes[name], dtype=torch.float64)
        for c, snapshot in zip(
            coefficients(self._shape, len(self._snapshots)), self._snapshots, strict=True
        ):
            found.add_(snapshot[name], alpha=c)
        if name in self._base:
            found.sub_(self._base[name]).mul_(self._scale).add_(self._base[name])
        return found.float()

    def write(self, file: Path) -> None:
        """Write the sum into `file`, and the snapshots, which a resumed run needs, into a file
        beside it (a collective)."""
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
            # With a smaller training.merge.last than before, only the newest are kept.
            for j in range(count)[-(self._snapshots.maxlen or 0) :]:
                self._snapshots.append({name: held.get_tensor(f"{j}.{name}") for name in mine})


def snapshots_of(file: Path) -> Path:
    """The file of snapshots beside a merge's file. Its tensors are named "j.weight"; j = 0 is the
    oldest snapshot."""
    return file.with_name("snapshots.safetensors")
