"""The advantage of GRPO: a reward against its group's mean, over a standard deviation."""

from __future__ import annotations

import numpy as np

from tempflow.advantages.base import Advantage, Over, clipped, normalise
from tempflow.errors import check_range
from tempflow.types import Advantages, Rewards, Slots


class Group(Advantage):
    """The weighted sum of the rewards, normalised in each group: A = (r - mean) / (std + 1e-4).

    Args:
        over: whose rewards are normalised together: "seed", the children of one state, or "prompt", all of a prompt at a step.
        clip: advantages are clipped to +- this.
        global_std: divide by the standard deviation of all rewards of the iteration, not the group's. Prompts with different
            rewards have one each, since sums of different rewards differ in level and scale.
    """

    def __init__(self, over: Over = "seed", clip: float = 5.0, global_std: bool = False):
        check_range("clip", clip, above=0)
        self.over, self.clip, self.global_std = over, clip, global_std

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        scale = std_of_kinds(rewards) if self.global_std else None
        found = normalise(rewards.total, slots.groups(self.over), scale)
        return clipped(found.values, found.flat, found, slots, self.clip)


def std_of_kinds(rewards: Rewards) -> np.ndarray:
    """The standard deviation of all valid rewards of each slot's kind, float64 [n]; a kind has the same rewards applied to it."""
    total = rewards.total
    applied = np.stack([*rewards.applies.values(), np.ones(len(total), dtype=bool)], axis=1)
    _, kinds = np.unique(applied, axis=0, return_inverse=True)
    scale, valid = np.zeros(len(total)), np.isfinite(total)
    for kind in range(kinds.max(initial=-1) + 1):
        here = kinds.reshape(-1) == kind
        scale[here] = np.std(total[here & valid]) if (here & valid).any() else 0.0
    return scale
