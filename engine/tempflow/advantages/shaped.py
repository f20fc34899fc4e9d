"""What advantages of whole rewards have in common: a utility before the normalization, a scale in
it, an anchor after it."""

from __future__ import annotations

import numpy as np

from tempflow.advantages.base import Advantage, Normalized, Over, Scale, normalize
from tempflow.advantages.utilities import make
from tempflow.errors import UserError, check_range
from tempflow.types import Rewards


class Shaped(Advantage):
    """Rewards that a utility may change, normalized in their groups.

    Args:
        over: whose rewards are normalized together: "seed", the children of one state, or "prompt",
            all of a prompt at a step.
        clip: advantages are clipped to +- this.
        global_std: divide by the standard deviation of all rewards of the iteration, not the
            group's. Prompts with different rewards have one each, since sums of different rewards
            differ in level and scale.
        utility: what a reward is worth before it is compared: "cvar" or "superquantile" (options
            level and over, "group" or "batch"), "mean_variance" (coef, over), "win_rate" or
            "novelty" (coef), or a table of the type and options; null: itself.
        scale: what the distance to the group's mean is divided by: "std", "quasi_norm", (sum
            |d|^0.8)^(1/0.8) over the group's distances d, or "none".
        anchor: adds this times the utility to the advantage, so that a group without spread has
            one; at least 0.
    """

    def __init__(
        self,
        over: Over = "seed",
        clip: float = 5.0,
        global_std: bool = False,
        utility: str | dict | None = None,
        scale: Scale = "std",
        anchor: float = 0.0,
    ):
        check_range("clip", clip, above=0)
        check_range("anchor", anchor, least=0)
        if global_std and scale != "std":
            raise UserError(
                'global_std: true is a standard deviation, and goes with scale "std" alone, not'
                f" {scale!r}"
            )
        self.over, self.clip, self.global_std, self.scale, self.anchor = (
            over,
            clip,
            global_std,
            scale,
            anchor,
        )
        self.utility = make(utility)

    @property
    def needs_novelty(self) -> bool:  # type: ignore[override]  # decided by the utility
        return self.utility is not None and self.utility.needs_novelty

    def worth(
        self, rewards: np.ndarray, labels: np.ndarray, kinds: np.ndarray, novelty: np.ndarray | None
    ) -> np.ndarray:
        """The utility of rewards, float64 [n]. kinds: int [n]: whose prompts have the same rewards;
        the rest as for a `Utility`."""
        if self.utility is None:
            return rewards
        known = np.where(np.isfinite(rewards), rewards, np.nan)
        return self.utility(known, labels if self.utility.over == "group" else kinds, novelty)

    def normalized(self, rewards: np.ndarray, labels: np.ndarray, kinds: np.ndarray) -> Normalized:
        """Against the group, in the units of `scale`."""
        return normalize(
            rewards, labels, std_within(rewards, kinds) if self.global_std else None, self.scale
        )

    def anchored(self, values: np.ndarray, worth: np.ndarray) -> np.ndarray:
        """Values with the anchor's share of what each reward is worth; 0 where that is masked."""
        return (
            values + self.anchor * np.where(np.isfinite(worth), worth, 0.0)
            if self.anchor
            else values
        )


def kinds_of(rewards: Rewards) -> np.ndarray:
    """int [n], labels from 0 on: slots of prompts that have the same rewards."""
    applied = np.stack([*rewards.applies.values(), np.ones(len(rewards.total), dtype=bool)], axis=1)
    return np.unique(applied, axis=0, return_inverse=True)[1].reshape(-1)


def std_within(rewards: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """The standard deviation of all finite rewards of each slot's kind, float64 [n]."""
    scale, valid = np.zeros(len(rewards)), np.isfinite(rewards)
    for kind in range(kinds.max(initial=-1) + 1):
        here = kinds == kind
        scale[here] = np.std(rewards[here & valid]) if (here & valid).any() else 0.0
    return scale
