"""Several rewards to one: the weighted sum, with failures kept as masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempflow.rewards.protocol import Scores
from tempflow.rewards.registry import RewardSpec


@dataclass(frozen=True)
class Combined:
    """Rewards of n pictures.

    values: float32 [n], the weighted sum; NaN where a reward that counts could not score the picture.
    parts: each reward alone, unweighted, float32 [n], for the log.
    """

    values: np.ndarray
    parts: dict[str, np.ndarray]


def combine(scores: dict[str, Scores], specs: list[RewardSpec]) -> Combined:
    """Sum the rewards of `specs` with their weights.

    A watched reward is in `parts`; it counts nothing, and its failures mask nothing.
    scores: one entry of `RewardPool.gather`. Raises KeyError if it lacks a reward of `specs`.
    """
    parts = {spec.name: scores[spec.name].values for spec in specs}
    counted = [spec.weight * parts[spec.name].astype(np.float64) for spec in specs if not spec.watched]
    return Combined(np.sum(counted, axis=0).astype(np.float32), parts)
