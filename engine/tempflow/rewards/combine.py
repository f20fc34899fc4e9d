"""The weighted sum of the rewards that apply to an image; if one of them failed, the image is
masked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempflow.rewards.base import Scores
from tempflow.rewards.registry import RewardSpec


@dataclass(frozen=True)
class Combined:
    """The rewards of n images."""

    values: np.ndarray
    """float32 [n], the weighted sum; NaN if a reward of the sum could not score the image, or if
    the sum overflows."""
    parts: dict[str, np.ndarray]
    """By reward: its values without the weight, float32 [n], for the log; NaN where it failed or
    does not apply."""
    applies: dict[str, np.ndarray]
    """By reward: whether the image's prompt asks for it, bool [n]."""


def combine(scores: dict[str, Scores], specs: list[RewardSpec]) -> Combined:
    """Sum, for each image, the weighted rewards that apply to its prompt.

    A watched reward (weight 0) is in `parts` but not in the sum, and its failures mask no image.

    Args:
        scores: one entry of what `RewardPool.gather` returns, all of n images.
        specs: the rewards to combine.

    Raises:
        KeyError: if `scores` lacks a reward of `specs`.
    """
    parts = {spec.name: scores[spec.name].values for spec in specs}
    applies = {spec.name: scores[spec.name].applicable() for spec in specs}
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is masked below
        trained = [spec for spec in specs if not spec.watched]
        # In float64, rounded once. Rewards of weight 0 are left out, as 0 * NaN would mask the
        # image; so are those that do not apply, whose values are NaN.
        counted = [
            np.where(applies[s.name], s.weight * parts[s.name].astype(np.float64), 0.0)
            for s in trained
        ]
        total = np.sum(counted, axis=0).astype(np.float32)
    return Combined(np.where(np.isfinite(total), total, np.float32(np.nan)), parts, applies)
