"""The advantage of GRPO: a reward minus its group's mean, over a standard deviation."""

from __future__ import annotations

from tempflow.advantages.base import clipped, normalize
from tempflow.advantages.shaped import Shaped, kinds_of
from tempflow.types import Advantages, Rewards, Slots


class Group(Shaped):
    """The weighted sum of the rewards, normalized in each group: A = (r - mean) / (std + 1e-4)."""

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        labels, kinds = slots.groups(self.over), kinds_of(rewards)
        worth = self.worth(rewards.total, labels, kinds, rewards.novelty)
        found = self.normalized(worth, labels, kinds)
        # Zero-advantage groups and spreads are reported of the rewards, not of their utilities.
        plain = found if self.utility is None else normalize(rewards.total, labels)
        return clipped(self.anchored(found.values, worth), plain.flat, plain, slots, self.clip)
