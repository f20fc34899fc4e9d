"""The protocol of advantages, and the arithmetic that groups have in common.

Arrays hold the slots of all ranks, so every rank computes the same numbers whatever their count.
The arithmetic is float64; standard deviations are those of the population (divided by n).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tempflow.types import Advantages, Rewards, Slots

EPSILON = 1e-4
QUASI = 0.8  # p of the quasi-norm
Scale = Literal["std", "quasi_norm", "none"]
Over = Literal["state", "seed", "prompt", "step"]  # the groups that slots have


class Advantage(ABC):
    """From rewards to advantages."""

    over: str = "seed"
    """Whose rewards are normalized together, one of `Slots.OVER`."""
    needs_novelty: bool = False
    """Whether it reads `novelty` of the rewards."""
    needs_values = False
    """Whether it reads `before` and `after` of the rewards, which plans with values have."""

    @abstractmethod
    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        """The advantages of all slots; NaN in `rewards.total` marks a failed reward, whose slot is
        masked."""


@dataclass(frozen=True)
class Normalized:
    """Rewards against their groups."""

    values: np.ndarray
    """float64 [n]: (r - mean) over a scale, unclipped; 0 where masked or flat."""
    valid: np.ndarray
    """bool [n]."""
    labels: np.ndarray
    """int [n]."""
    flat: np.ndarray
    """bool [groups]: without spread."""
    std: np.ndarray
    """float64 [groups]."""


def normalize(
    rewards: np.ndarray, labels: np.ndarray, scale: np.ndarray | None = None, by: Scale = "std"
) -> Normalized:
    """(r - mean) / (std + 1e-4) in each group; a group without spread has values of exactly 0.

    Args:
        rewards: float64 [n]; NaN is left out of its group.
        labels: int [n], from 0 on.
        scale: float64 [n], used for the standard deviation of the group where given.
        by: "quasi_norm" divides by (sum |r - mean|^0.8)^(1/0.8) instead, which gives a few that
            stand out more (Neighbor GRPO, arXiv 2511.16955); "none" not at all.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    valid, groups = np.isfinite(rewards), int(labels.max(initial=-1)) + 1

    def sums(values):
        return np.bincount(labels, weights=values, minlength=groups)

    count = np.maximum(sums(valid), 1)
    mean = sums(np.where(valid, rewards, 0.0)) / count
    deviation = np.where(valid, rewards - mean[labels], 0.0)
    std = np.sqrt(sums(deviation**2) / count)
    highest, lowest = np.full(groups, -np.inf), np.full(groups, np.inf)
    np.maximum.at(highest, labels[valid], rewards[valid])
    np.minimum.at(lowest, labels[valid], rewards[valid])
    flat = highest <= lowest
    if by == "quasi_norm":
        scale = (sums(np.abs(deviation) ** QUASI) ** (1 / QUASI))[labels]
    over = 1.0 if by == "none" else (std[labels] if scale is None else scale) + EPSILON
    values = np.where(flat[labels] | ~valid, 0.0, deviation / over)
    return Normalized(values, valid, labels, flat, std)


def clipped(
    values: np.ndarray, flat: np.ndarray, rewards: Normalized, slots: Slots, clip: float
) -> Advantages:
    """Advantages of normalized values, with the spread of the rewards they come from.

    Args:
        values: float64 [n].
        flat: bool [groups], groups that are reported as without spread.
        rewards: whose standard deviations are reported, step by step.
        slots: where each value belongs.
        clip: values are clipped to +- this.
    """
    _, first = np.unique(rewards.labels, return_index=True)
    live = np.bincount(rewards.labels, weights=rewards.valid) > 0
    spread = {}
    for step in slots.steps():
        here = (slots.step[first] == step) & live
        spread[step] = (
            float(np.cumsum(rewards.std[here])[-1] / here.sum()) if here.any() else float("nan")
        )
    return Advantages(np.clip(values, -clip, clip).astype(np.float32), rewards.valid, flat, spread)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rho of two sets of values, [n] each, with mean ranks for ties; NaN where either is
    constant."""
    ranks = [_mean_ranks(values) for values in (one, other)]
    if not len(one) or any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
