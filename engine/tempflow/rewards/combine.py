"""Several rewards to one: the weighted sum of those that apply, with failures kept as masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempflow.rewards.base import Scores
from tempflow.rewards.registry import RewardSpec


@dataclass(frozen=True)
class Combined:
    """Rewards of n images.

    values: float32 [n], the weighted sum; NaN where a reward that counts could not score the image,
    or the sum overflows.
    parts: each reward alone, unweighted, float32 [n], for the log; NaN where it failed or does not
    apply.
    applies: bool [n] by reward, whether the image's prompt is for it.
    """

    values: np.ndarray
    parts: dict[str, np.ndarray]
    applies: dict[str, np.ndarray]


def combine(scores: dict[str, Scores], specs: list[RewardSpec]) -> Combined:
    """Sum the rewards of `specs` with their weights, for each image those that apply to its prompt.

    A watched reward is in `parts`; it counts nothing, and its failures mask nothing.
    scores: one entry of `RewardPool.gather`. Raises KeyError if it lacks a reward of `specs`.
    """
    parts = {spec.name: scores[spec.name].values for spec in specs}
    applies = {spec.name: scores[spec.name].applicable() for spec in specs}
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is masked below
        trained = [spec for spec in specs if not spec.watched]
        counted = [
            np.where(applies[s.name], s.weight * parts[s.name].astype(np.float64), 0.0)
            for s in trained
        ]
        total = np.sum(counted, axis=0).astype(np.float32)
    return Combined(np.where(np.isfinite(total), total, np.float32(np.nan)), parts, applies)
