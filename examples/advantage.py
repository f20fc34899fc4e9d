"""An advantage of your own: it uses only the order of the rewards within a group, not the distances
between them."""

import numpy as np

from tempflow.advantages.base import Advantage, Over, clipped, normalize
from tempflow.types import Advantages, Rewards, Slots


class RankAdvantage(Advantage):
    """The rank of each reward in its group, normalized like a reward.

    Args:
        over: whose rewards are compared: "seed", the children of one state; or "prompt", those of
            a prompt at a step.
    """

    def __init__(self, over: Over = "seed"):
        self.over = over

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        labels, ranks = slots.groups(self.over), np.full(len(slots), np.nan)
        for group in range(labels.max() + 1):
            # A failed reward stays NaN, which masks its child.
            members = np.flatnonzero((labels == group) & np.isfinite(rewards.total))
            values = rewards.total[members]
            ranks[members] = [
                (values < value).sum() + (values == value).sum() / 2 for value in values
            ]
        # Equal rewards have equal ranks, so a group of equal rewards has advantages of 0.
        found = normalize(ranks, labels)
        return clipped(found.values, found.flat, normalize(rewards.total, labels), slots, clip=5.0)
