"""The options that advantages of whole rewards share: a utility before the normalization, a scale
in it, and an anchor after it."""

from __future__ import annotations

import numpy as np

from tempflow.advantages.base import Advantage, Normalized, Over, Scale, normalize
from tempflow.advantages.utilities import make
from tempflow.errors import UserError, check_range
from tempflow.types import Rewards


class Shaped(Advantage):
    """Rewards normalized in their groups, optionally after a utility has transformed them.

    Args:
        over: whose rewards are normalized together: "seed", the children of one state; or "prompt",
            those of a prompt at a step.
        clip: advantages are clipped to +- this.
        global_std: divide by the standard deviation of all rewards of the iteration instead of the
            group's. It is taken separately for prompts with different sets of rewards, because
            their sums differ in level and scale.
        utility: a function applied to the rewards before they are compared: "cvar" or
            "superquantile" (options level and over, "group" or "batch"), "mean_variance" (coef,
            over), "win_rate" or "novelty" (coef), or a table of the type and options; null: none.
        scale: divisor of the distance from the group's mean: "std"; "quasi_norm", (sum
            |d|^0.8)^(1/0.8) over the group's distances d; or "none".
        anchor: this times the utility is added to the advantage, so that a group whose rewards are
            all equal has one as well; at least 0.
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
                'global_std: true divides by a standard deviation, which needs scale "std", got'
                f" scale {scale!r}"
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
        """The utility of each reward, float64 [n]; the rewards themselves without a utility.

        Args:
            rewards: float64 [n]; not finite where one failed.
            labels: int [n], the group of each slot.
            kinds: int [n], as of `kinds_of`.
            novelty: float64 [n], as of `Rewards.novelty`.
        """
        if self.utility is None:
            return rewards
        # Utilities take NaN for masked, so an infinite reward is one as well.
        known = np.where(np.isfinite(rewards), rewards, np.nan)
        return self.utility(known, labels if self.utility.over == "group" else kinds, novelty)

    def normalized(self, rewards: np.ndarray, labels: np.ndarray, kinds: np.ndarray) -> Normalized:
        """Rewards [n] normalized in their groups, by `scale` or `global_std`."""
        return normalize(
            rewards, labels, std_within(rewards, kinds) if self.global_std else None, self.scale
        )

    def anchored(self, values: np.ndarray, worth: np.ndarray) -> np.ndarray:
        """values + anchor * worth, float64 [n]; `worth` counts as 0 where it is masked."""
        # Without an anchor the array is returned as it is, so that no bit of it changes.
        return (
            values + self.anchor * np.where(np.isfinite(worth), worth, 0.0)
            if self.anchor
            else values
        )


def kinds_of(rewards: Rewards) -> np.ndarray:
    """int [n], labels from 0 on: equal for slots whose prompts have the same set of rewards."""
    # A last column of ones: without any reward np.stack would have nothing to stack.
    applied = np.stack([*rewards.applies.values(), np.ones(len(rewards.total), dtype=bool)], axis=1)
    return np.unique(applied, axis=0, return_inverse=True)[1].reshape(-1)


def std_within(rewards: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """For each slot the standard deviation of all finite rewards of its kind, float64 [n]."""
    scale, valid = np.zeros(len(rewards)), np.isfinite(rewards)
    for kind in range(kinds.max(initial=-1) + 1):
        here = kinds == kind
        scale[here] = np.std(rewards[here & valid]) if (here & valid).any() else 0.0
    return scale
