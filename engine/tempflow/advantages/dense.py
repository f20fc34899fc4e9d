"""Group-normalised advantages with masks (DESIGN section 2).

Rewards come as a dense array of all ranks' values, so every rank computes the same numbers whatever their count. The
arithmetic is float64; standard deviations are those of the population (divided by n).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EPSILON = 1e-4


@dataclass(frozen=True)
class Advantages:
    """values: float32 [P, S, K, B], 0 where masked. valid: bool, same shape, False where the reward failed.

    zero_spread: bool, groups whose valid rewards are all equal; groups: [P, S, K] for seed groups, [P, K] for prompt
    groups. spread: float64 [K], mean standard deviation of the groups of each step (NaN where none is valid).
    """

    values: np.ndarray
    valid: np.ndarray
    zero_spread: np.ndarray
    spread: np.ndarray


def advantages(rewards: np.ndarray, *, group: str, global_std: bool, clip: float, kinds: np.ndarray | None = None) -> Advantages:
    """A = (r - mean) / (std + 1e-4), clipped to +-clip.

    rewards: [P, S, K, B] over prompts, seeds, stochastic steps and children; NaN marks a failed reward, which is left out
    of its group. group: "seed" normalises over B, "prompt" over S x B. global_std divides by the standard
    deviation of all valid rewards instead of the group's; kinds: int [P], prompts with the same rewards, of which each kind has
    a standard deviation of its own, since sums of different rewards differ in level and scale; None: all are of one kind. A
    group without spread has advantage exactly 0.
    """
    found = _normalise(rewards, group, global_std, kinds)
    return _advantages(found.values, found.flat, found, clip)


def decoupled_advantages(
    rewards: np.ndarray, parts: list[np.ndarray], weights: list[float], *, group: str, global_std: bool, clip: float,
    applies: list[np.ndarray] | None = None,
) -> Advantages:  # fmt: skip
    """Advantages of several rewards, each normalised by itself: GDPO (arXiv 2601.05242, equations 4 to 6).

    Each reward's advantage is that of `advantages`, unclipped; A_sum is their weighted sum; the result is
    A_sum / (std(A_sum) + 1e-4), clipped to +-clip, with the standard deviation over all valid pictures of the batch. GDPO
    subtracts the batch's mean as well, which is 0 here: every group's advantages are centred. So a reward counts by its
    weight, whatever its scale, and only the weights' ratios matter.

    rewards: [P, S, K, B], the weighted sum, whose spread is reported. parts: R arrays of that shape, those that are trained
    on, with their R weights. applies: R times bool [P], the prompts that each is for; None: all. An image that any of its prompt's
    rewards failed to score is left out of every group. A group has no spread where none of its rewards has.
    """
    asked = [np.reshape(one, (-1, 1, 1, 1)) for one in applies] if applies else [np.ones((len(rewards), 1, 1, 1), dtype=bool)] * len(parts)
    valid = np.logical_and.reduce([np.isfinite(rewards), *(np.isfinite(part) | ~one for part, one in zip(parts, asked, strict=True))])
    found = [_normalise(np.where(valid & one, part, np.nan), group, global_std) for part, one in zip(parts, asked, strict=True)]
    total = sum(weight * one.values for weight, one in zip(weights, found, strict=True))
    scale = np.std(total[valid]) if valid.any() else 0.0
    flat = np.logical_and.reduce([one.flat for one in found])
    return _advantages(total / (scale + EPSILON), flat, _normalise(np.where(valid, rewards, np.nan), group, global_std), clip)


@dataclass(frozen=True)
class _Normalised:
    """values: float64 [P, S, K, B], 0 where masked or flat. flat: groups without spread; std: theirs; reduced axes have size 1."""

    values: np.ndarray
    valid: np.ndarray
    flat: np.ndarray
    std: np.ndarray
    axes: tuple[int, ...]


def _normalise(rewards: np.ndarray, group: str, global_std: bool, kinds: np.ndarray | None = None) -> _Normalised:
    rewards = np.asarray(rewards, dtype=np.float64)
    axes = {"seed": (3,), "prompt": (1, 3)}[group]
    valid = np.isfinite(rewards)
    count = np.maximum(valid.sum(axes, keepdims=True), 1)
    filled = np.where(valid, rewards, 0.0)
    mean = filled.sum(axes, keepdims=True) / count
    deviation = np.where(valid, rewards - mean, 0.0)
    std = np.sqrt((deviation**2).sum(axes, keepdims=True) / count)
    highest = np.where(valid, rewards, -np.inf).max(axes, keepdims=True)
    lowest = np.where(valid, rewards, np.inf).min(axes, keepdims=True)
    flat = highest <= lowest
    scale = _std_of_kinds(rewards, valid, kinds) if global_std else std
    values = np.where(flat | ~valid, 0.0, deviation / (scale + EPSILON))
    return _Normalised(values, valid, flat, std, axes)


def _std_of_kinds(rewards: np.ndarray, valid: np.ndarray, kinds: np.ndarray | None) -> np.ndarray:
    """The standard deviation of all valid rewards of each prompt's kind, [P, 1, 1, 1]; 0 where there is none."""
    kinds = np.zeros(len(rewards), dtype=int) if kinds is None else kinds
    scale = np.zeros((len(rewards), 1, 1, 1))
    for kind in np.unique(kinds):
        seen = rewards[kinds == kind][valid[kinds == kind]]
        scale[kinds == kind] = np.std(seen) if len(seen) else 0.0
    return scale


def _advantages(values: np.ndarray, flat: np.ndarray, rewards: _Normalised, clip: float) -> Advantages:
    live = rewards.valid.any(rewards.axes, keepdims=True)
    others = tuple(axis for axis in range(4) if axis != 2)
    totals = live.sum(others)
    spread = np.where(live, rewards.std, 0.0).sum(others) / np.where(totals == 0, np.nan, totals)
    clipped = np.clip(values, -clip, clip).astype(np.float32)
    return Advantages(clipped, rewards.valid, np.squeeze(flat, rewards.axes), spread)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rho of two sets of values, [n] each, with mean ranks for ties; NaN where either is constant."""
    ranks = [_mean_ranks(values) for values in (one, other)]
    if not len(one) or any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
