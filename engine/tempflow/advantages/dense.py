"""DenseGRPO: the reward that each step of a path adds (arXiv 2601.20218)."""

from __future__ import annotations

from tempflow.advantages.base import Advantage, Over, clipped, normalize
from tempflow.errors import check_range
from tempflow.types import Advantages, Rewards, Slots


class Dense(Advantage):
    """The gain of each step, normalized in each group: the value of the state after the step minus
    the value of the state before it (DenseGRPO).

    The value of a state is the reward of its completion by the ODE, so the plan must have values.

    Args:
        over: whose gains are normalized together: "prompt", those of a prompt at a step; or "step",
            those of all prompts at a step.
        clip: advantages are clipped to +- this.
    """

    needs_values = True

    def __init__(self, over: Over = "prompt", clip: float = 5.0):
        check_range("clip", clip, above=0)
        self.over, self.clip = over, clip

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        before, after = rewards.values()
        found = normalize(after - before, slots.groups(self.over))
        return clipped(found.values, found.flat, found, slots, self.clip)
