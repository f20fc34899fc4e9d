"""TP-GRPO: a step that turns a path gets the credit for the rest of the path (arXiv
2602.06422)."""

from __future__ import annotations

import numpy as np

from tempflow.advantages.base import Advantage, Over, clipped, normalize
from tempflow.errors import UserError, check_range
from tempflow.types import Advantages, Rewards, Slots


class TurningPoint(Advantage):
    """The gain of each step, or at a turning point the gain of the rest of the path, normalized in
    each group (TP-GRPO).

    A step is a turning point if its gain has the sign of the whole path's gain and the gain of the
    step before it has the other sign.

    Args:
        over: whose credits are normalized together: "prompt", those of a prompt at a step; or
            "step", those of all prompts at a step.
        clip: advantages are clipped to +- this.
        first: also count a path's first step as a turning point if its gain has the sign of the
            whole path's.
    """

    needs_values = True

    def __init__(self, over: Over = "prompt", clip: float = 5.0, first: bool = False):
        check_range("clip", clip, above=0)
        self.over, self.clip, self.first = over, clip, first

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        found = normalize(self.credit(slots, rewards), slots.groups(self.over))
        return clipped(found.values, found.flat, found, slots, self.clip)

    def credit(self, slots: Slots, rewards: Rewards) -> np.ndarray:
        """The credit of each slot before normalization, float64 [n]; NaN where a failed reward
        makes it unknown.

        Raises:
            UserError: the rows of a seed are not one single path.
        """
        # Slots in the order of their paths: by prompt, then seed, then step (lexsort's last key is
        # the first one to sort by).
        order = np.lexsort((slots.step, slots.seed, slots.prompt))
        paths = slots.groups("seed", by_step=False)[order]
        starts = np.r_[True, np.diff(paths) != 0]
        # Two slots at one step of a seed: the path branches.
        if (np.diff(slots.step[order])[~starts[1:]] == 0).any():
            raise UserError(
                "training.advantage: turning_point needs a plan with one path for each seed, such"
                " as flow_grpo or mix_grpo with values; this plan branches"
            )
        before, after = (values[order] for values in rewards.values())
        path = np.cumsum(starts) - 1
        # The value at the end of each slot's path, and the slot's own gain.
        end, gain = after[np.r_[starts[1:], True]][path], after - before
        # 1: the way of the whole path, -1: the other way
        along = np.sign(gain) * np.sign(end - before[starts][path])
        # The sign of the step before. A first step has none: 0 never counts as the other sign, -1
        # always does.
        was = np.where(starts, -1.0 if self.first else 0.0, np.roll(along, 1))
        credit = np.where((along > 0) & (was < 0), end - before, gain)
        # Whether a step turns is unknown if its own sign is, or if it may turn and the sign before
        # it is. The NaN masks it; its gain alone would be credit for something else.
        may_turn = ~starts | self.first
        credit[may_turn & (np.isnan(along) | (along > 0) & np.isnan(was))] = np.nan
        # Back to the order of the slots.
        found = np.empty_like(credit)
        found[order] = credit
        return found
