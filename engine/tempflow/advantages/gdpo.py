"""GDPO: several rewards, each normalised by itself (arXiv 2601.05242, equations 4 to 6)."""

from __future__ import annotations

from typing import Literal

from tempflow.advantages.base import Advantage
from tempflow.advantages.dense import decoupled_advantages
from tempflow.errors import check_range


class Gdpo(Advantage):
    """Each reward normalised by itself in groups, then their weighted sum over its standard deviation (GDPO).

    Args:
        over: whose rewards are normalised together: "seed", the children of one state, or "prompt", all of a prompt at a step.
        clip: advantages are clipped to +- this.
        global_std: divide each reward by its standard deviation over the iteration, not the group's.
    """

    def __init__(self, over: Literal["seed", "prompt"] = "seed", clip: float = 5.0, global_std: bool = False):
        check_range("clip", clip, above=0)
        self.over, self.clip, self.global_std = over, clip, global_std

    def __call__(self, rewards, parts, weights, fitting):
        return decoupled_advantages(
            rewards, list(parts.values()), [weights[name] for name in parts], applies=list(fitting.T),
            group=self.over, global_std=self.global_std, clip=self.clip,
        )  # fmt: skip
