"""GDPO: several rewards, each normalized by itself (arXiv 2601.05242, equations 4 to 6)."""

from __future__ import annotations

import numpy as np

from tempflow.advantages.base import EPSILON, clipped, normalize
from tempflow.advantages.shaped import Shaped
from tempflow.types import Advantages, Rewards, Slots


class Gdpo(Shaped):
    """Each reward normalized by itself; their weighted sum over its standard deviation of the whole
    iteration (GDPO).

    Only the ratios of the weights matter, whatever the scale of each reward. The paper subtracts
    the batch's mean as well, which is 0 here: the advantages of every group are centred. An image
    that any of its prompt's rewards failed to score is left out of every group. A utility is taken
    of each reward by itself, and the anchor of their weighted sum.
    """

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        labels, parts, applies = slots.groups(self.over), rewards.parts, rewards.applies
        valid = np.logical_and.reduce(
            [
                np.isfinite(rewards.total),
                *(np.isfinite(parts[name]) | ~applies[name] for name in parts),
            ]
        )
        alone = {name: np.where(valid & applies[name], parts[name], np.nan) for name in parts}
        # of one kind: where a reward is not for a prompt it is NaN
        everything = np.zeros(len(labels), dtype=int)
        worth = {
            name: self.worth(part, labels, everything, rewards.novelty)
            for name, part in alone.items()
        }
        found = {name: self.normalized(part, labels, everything) for name, part in worth.items()}
        total = sum(rewards.weights[name] * one.values for name, one in found.items())
        scale = np.std(total[valid]) if valid.any() else 0.0  # type: ignore[index]  # an array: there is at least one reward
        values = self.anchored(total / (scale + EPSILON), self._sum(worth, rewards.weights, valid))  # type: ignore[arg-type]  # an array: there is at least one reward
        plain = (
            found
            if self.utility is None
            else {name: normalize(part, labels) for name, part in alone.items()}
        )
        flat = np.logical_and.reduce([one.flat for one in plain.values()])
        return clipped(
            values,
            flat,
            normalize(np.where(valid, rewards.total, np.nan), labels),
            slots,
            self.clip,
        )

    def _sum(
        self, worth: dict[str, np.ndarray], weights: dict[str, float], valid: np.ndarray
    ) -> np.ndarray:
        """Weighted, of the rewards that are for the prompt; NaN where masked."""
        return np.where(
            valid, sum(weights[name] * np.nan_to_num(part) for name, part in worth.items()), np.nan
        )
