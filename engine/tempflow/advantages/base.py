"""The protocol of advantages, and the arithmetic that they share.

Arrays hold the slots of all ranks, so every rank computes the same numbers, whatever the number of
ranks. The arithmetic is float64. Standard deviations are those of the population (divided by n).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tempflow.types import Advantages, Rewards, Slots

EPSILON = 1e-4  # added to a standard deviation: docs/method.md, Advantages
QUASI = 0.8  # p of the quasi-norm
Scale = Literal["std", "quasi_norm", "none"]
Over = Literal["state", "seed", "prompt", "step"]  # the groups that slots have


class Advantage(ABC):
    """A function from rewards to advantages."""

    over: str = "seed"
    """Whose rewards are normalized together: a key of `Slots.OVER`."""
    needs_novelty: bool = False
    """Whether it reads `Rewards.novelty`, which is computed on request only."""
    needs_values = False
    """Whether it reads `Rewards.before` and `Rewards.after`, which plans with values provide."""
    needs_maps = False
    """Whether it reads `Rewards.maps`, which some rewards provide, and returns
    `Advantages.maps`."""
    needs_colors: bool = False
    """Whether it reads `Rewards.colors`, which are computed on request only."""

    @abstractmethod
    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        """The advantages of all slots.

        Args:
            slots: n slots, those of all ranks.
            rewards: arrays over the slots; NaN in `rewards.total` marks a failed reward, and the
                result must mask its slot.
        """


@dataclass(frozen=True)
class Normalized:
    """Rewards normalized in their groups."""

    values: np.ndarray
    """float64 [n]: (r - mean) over a scale, unclipped; 0 where masked, or where the group's rewards
    are all equal."""
    valid: np.ndarray
    """bool [n]: False where the reward failed."""
    labels: np.ndarray
    """int [n]: the group of each slot, from 0 on."""
    flat: np.ndarray
    """bool [groups]: whether the valid rewards of a group are all equal."""
    std: np.ndarray
    """float64 [groups]: standard deviation of the valid rewards."""


def normalize(
    rewards: np.ndarray, labels: np.ndarray, scale: np.ndarray | None = None, by: Scale = "std"
) -> Normalized:
    """(r - mean) / (std + 1e-4) in each group. A group whose rewards are all equal has values of
    exactly 0.

    Args:
        rewards: float64 [n]; NaN is left out of its group.
        labels: int [n], the group of each reward, from 0 on.
        scale: float64 [n], in place of the standard deviation of the group; None: that one.
        by: "std"; "quasi_norm" divides by (sum |r - mean|^0.8)^(1/0.8), which gives more weight to
            few rewards that stand out (Neighbor GRPO, arXiv 2511.16955); "none" does not divide.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    valid, groups = np.isfinite(rewards), int(labels.max(initial=-1)) + 1

    def sums(values):
        return np.bincount(labels, weights=values, minlength=groups)

    # At least 1: a group whose rewards all failed has no mean, and its values are set to 0 below.
    count = np.maximum(sums(valid), 1)
    mean = sums(np.where(valid, rewards, 0.0)) / count
    deviation = np.where(valid, rewards - mean[labels], 0.0)
    std = np.sqrt(sums(deviation**2) / count)
    # By the extremes and not by std == 0: the mean of equal rewards is rounded, so their standard
    # deviation may be 1e-17, which would be divided by EPSILON and give values other than 0.
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
    """Advantages from normalized values, with what is reported about the rewards behind them.

    Args:
        values: float64 [n].
        flat: bool [groups]: groups to report as having equal rewards.
        rewards: the normalized rewards, whose standard deviations are reported for each step.
        slots: n slots.
        clip: values are clipped to +- this.
    """
    # A group is of one step, so its first slot tells the step.
    _, first = np.unique(rewards.labels, return_index=True)
    live = np.bincount(rewards.labels, weights=rewards.valid) > 0
    spread = {}
    for step in slots.steps():
        here = (slots.step[first] == step) & live
        # cumsum adds in order of the groups; np.mean adds in pairs, in an order that depends on n.
        spread[step] = (
            float(np.cumsum(rewards.std[here])[-1] / here.sum()) if here.any() else float("nan")
        )
    return Advantages(np.clip(values, -clip, clip).astype(np.float32), rewards.valid, flat, spread)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation of two sets of values, [n] each, with mean ranks for ties; NaN
    where either set is constant or empty."""
    ranks = [_mean_ranks(values) for values in (one, other)]
    if not len(one) or any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    # Of `count` equal values the ranks end at cumsum(count); their mean is half of count - 1 below.
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
