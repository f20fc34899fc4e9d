"""TP-GRPO: steps that turn a path get the credit for all that follows (arXiv 2602.06422)."""

from __future__ import annotations

import numpy as np

from tempflow.advantages.base import Advantage, Over, clipped, normalize
from tempflow.errors import UserError, check_range
from tempflow.types import Advantages, Rewards, Slots


class TurningPoint(Advantage):
    """The gain of each step, but of a turning point that of the rest of its path, normalized in
    each group (TP-GRPO).

    A path turns at a step that goes the way of the whole, in the sign of its gain, where the step
    before went the other way.

    Args:
        over: whose credits are normalized together: "prompt", all of a prompt at a step, or "step",
            those of all prompts.
        clip: advantages are clipped to +- this.
        first: count a path's first step as a turning point, too, where it goes the way of the
            whole.
    """

    needs_values = True

    def __init__(self, over: Over = "prompt", clip: float = 5.0, first: bool = False):
        check_range("clip", clip, above=0)
        self.over, self.clip, self.first = over, clip, first

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        found = normalize(self.credit(slots, rewards), slots.groups(self.over))
        return clipped(found.values, found.flat, found, slots, self.clip)

    def credit(self, slots: Slots, rewards: Rewards) -> np.ndarray:
        """float64 [n]: gains, and the rest of the path's where it turns; NaN where a failed reward
        leaves that open.

        UserError where the rows of a seed are no single path.
        """
        order = np.lexsort((slots.step, slots.seed, slots.prompt))
        paths = slots.groups("seed", by_step=False)[order]
        starts = np.r_[True, np.diff(paths) != 0]
        if (np.diff(slots.step[order])[~starts[1:]] == 0).any():
            raise UserError(
                "training.advantage: turning_point needs a plan with one path for each seed"
            )
        before, after = rewards.before[order], rewards.after[order]  # type: ignore[index]  # `needs_values`: the plan computes them
        path = np.cumsum(starts) - 1
        end, gain = after[np.r_[starts[1:], True]][path], after - before
        # 1: the way of the whole path, -1: the other way
        along = np.sign(gain) * np.sign(end - before[starts][path])
        was = np.where(starts, -1.0 if self.first else 0.0, np.roll(along, 1))
        credit = np.where((along > 0) & (was < 0), end - before, gain)
        may_turn = ~starts | self.first
        credit[may_turn & (np.isnan(along) | (along > 0) & np.isnan(was))] = np.nan
        found = np.empty_like(credit)
        found[order] = credit
        return found
