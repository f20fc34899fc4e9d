"""Stepwise-Flow-GRPO: the gains of all steps of a prompt, compared with each other (arXiv
2603.28718)."""

from __future__ import annotations

from tempflow.advantages.base import Advantage, Over, clipped, normalize
from tempflow.errors import check_range
from tempflow.types import Advantages, Rewards, Slots


class Stepwise(Advantage):
    """The gain of each step, normalized over all steps and paths of a group, so that steps that add
    more reward have larger advantages (Stepwise-Flow-GRPO).

    Args:
        over: whose gains are normalized together, over all steps: "prompt", those of a prompt; or
            "step", those of all prompts.
        clip: advantages are clipped to +- this.
    """

    needs_values = True

    def __init__(self, over: Over = "prompt", clip: float = 5.0):
        check_range("clip", clip, above=0)
        self.over, self.clip = over, clip

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        before, after = rewards.values()
        gain = after - before
        found = normalize(gain, slots.groups(self.over, by_step=False))
        # The groups of `found` span all steps, so the spread of each step is taken separately.
        return clipped(
            found.values, found.flat, normalize(gain, slots.groups(self.over)), slots, self.clip
        )
