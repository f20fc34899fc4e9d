"""GDPO: several rewards, each normalised by itself (arXiv 2601.05242, equations 4 to 6)."""

from __future__ import annotations

import numpy as np

from tempflow.advantages.base import EPSILON, Advantage, Over, clipped, normalise
from tempflow.errors import check_range
from tempflow.types import Advantages, Rewards, Slots


class Gdpo(Advantage):
    """Each reward normalised by itself; their weighted sum over its standard deviation of the whole iteration (GDPO).

    Only the ratios of the weights matter, whatever the scale of each reward. The paper subtracts the batch's mean as well,
    which is 0 here: the advantages of every group are centred. An image that any of its prompt's rewards failed to score is left
    out of every group.

    Args:
        over: whose rewards are normalised together: "seed", the children of one state, or "prompt", all of a prompt at a step.
        clip: advantages are clipped to +- this.
        global_std: divide each reward by its standard deviation over the iteration, not the group's.
    """

    def __init__(self, over: Over = "seed", clip: float = 5.0, global_std: bool = False):
        check_range("clip", clip, above=0)
        self.over, self.clip, self.global_std = over, clip, global_std

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        labels, parts, applies = slots.groups(self.over), rewards.parts, rewards.applies
        valid = np.logical_and.reduce([np.isfinite(rewards.total), *(np.isfinite(parts[name]) | ~applies[name] for name in parts)])
        found = {name: self._alone(np.where(valid & applies[name], parts[name], np.nan), labels) for name in parts}
        total = sum(rewards.weights[name] * one.values for name, one in found.items())
        scale = np.std(total[valid]) if valid.any() else 0.0
        flat = np.logical_and.reduce([one.flat for one in found.values()])
        return clipped(total / (scale + EPSILON), flat, normalise(np.where(valid, rewards.total, np.nan), labels), slots, self.clip)

    def _alone(self, rewards: np.ndarray, labels: np.ndarray):
        scale = None
        if self.global_std:
            known = rewards[np.isfinite(rewards)]
            scale = np.full(len(rewards), np.std(known) if len(known) else 0.0)
        return normalise(rewards, labels, scale)
