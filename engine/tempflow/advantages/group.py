"""Advantages of GRPO: the weighted sum of the rewards, normalised in groups."""

from __future__ import annotations

from typing import Literal

from tempflow.advantages.base import Advantage
from tempflow.advantages.dense import advantages
from tempflow.errors import check_range
from tempflow.rewards import kinds_of


class Group(Advantage):
    """The weighted sum of the rewards, normalised in groups.

    Args:
        over: whose rewards are normalised together: "seed", the children of one state, or "prompt", all of a prompt at a step.
        clip: advantages are clipped to +- this.
        global_std: divide by the standard deviation of the whole iteration, not the group's.
    """

    def __init__(self, over: Literal["seed", "prompt"] = "seed", clip: float = 5.0, global_std: bool = False):
        check_range("clip", clip, above=0)
        self.over, self.clip, self.global_std = over, clip, global_std

    def __call__(self, rewards, parts, weights, fitting):
        return advantages(rewards, group=self.over, global_std=self.global_std, clip=self.clip, kinds=kinds_of(fitting))
