"""GDPO: several rewards, each normalized separately (arXiv 2601.05242, equations 4 to 6)."""

from __future__ import annotations

from typing import cast

import numpy as np

from tempflow.advantages.base import EPSILON, clipped, normalize
from tempflow.advantages.shaped import Shaped
from tempflow.types import Advantages, Rewards, Slots


class Gdpo(Shaped):
    """Each reward is normalized separately; their weighted sum is divided by its standard deviation
    over the whole iteration (GDPO).

    The scale of a reward does not matter, only the ratios of the weights do. The paper also
    subtracts the mean of the batch, which is 0 here because every group is centered. An image that
    one of its prompt's rewards failed to score is left out of all groups. A utility applies to each
    reward separately, and the anchor to the weighted sum of the utilities.
    """

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        labels, parts, applies = slots.groups(self.over), rewards.parts, rewards.applies
        # A slot needs all rewards of its prompt: a sum over the others would be another quantity.
        valid = np.logical_and.reduce(
            [
                np.isfinite(rewards.total),
                *(np.isfinite(parts[name]) | ~applies[name] for name in parts),
            ]
        )
        alone = {name: np.where(valid & applies[name], parts[name], np.nan) for name in parts}
        # One kind for all prompts: a single reward has one level and scale, unlike sums of
        # different rewards, and it is NaN for prompts that it is not for.
        everything = np.zeros(len(labels), dtype=int)
        worth = {
            name: self.worth(part, labels, everything, rewards.novelty)
            for name, part in alone.items()
        }
        found = {name: self.normalized(part, labels, everything) for name, part in worth.items()}
        # An array and never the 0 of an empty sum: there is at least one reward.
        total = cast(np.ndarray, sum(rewards.weights[name] * found[name].values for name in found))
        scale = float(np.std(total[valid])) if valid.any() else 0.0
        values = self.anchored(total / (scale + EPSILON), self._sum(worth, rewards.weights, valid))
        # What is reported about spread is that of the rewards, not of their utilities.
        plain = (
            found
            if self.utility is None
            else {name: normalize(part, labels) for name, part in alone.items()}
        )
        # A group has no gradient only if every one of its rewards has no spread.
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
        """The weighted sum of the rewards that are for the slot's prompt, float64 [n]; NaN where
        masked."""
        # After `valid`, the remaining NaN are rewards that are not for the prompt: they add 0.
        return np.where(
            valid, sum(weights[name] * np.nan_to_num(part) for name, part in worth.items()), np.nan
        )
