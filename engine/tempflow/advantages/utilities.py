"""Utilities: functions applied to rewards before they are compared, for goals other than a higher
mean reward.

With group normalization, a utility over the group only changes the shape of the advantages. A
utility over the whole iteration also changes which groups have a gradient: a group whose rewards
all lie where the utility is constant has none. Masked rewards are NaN and stay NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from tempflow.errors import UserError, check_range, shown
from tempflow.registry import check_options

Whose = Literal["group", "batch"]


class Utility(ABC):
    """A function of a reward and the rewards that it is compared with."""

    over: Whose = "group"
    """The rewards that it is compared with: "group", those of its group; or "batch", those of the
    iteration whose prompts have the same set of rewards."""
    needs_novelty = False
    """Whether it reads the distance of an image to the others of its group."""

    def __call__(
        self, rewards: np.ndarray, labels: np.ndarray, novelty: np.ndarray | None = None
    ) -> np.ndarray:
        """Utilities, float64 [n].

        Args:
            rewards: float64 [n]; NaN where masked.
            labels: int [n], from 0 on, equal for rewards that are compared.
            novelty: float64 [n], mean distance of each image to the others of its group; NaN where
                there is none.
        """
        found = np.full(len(rewards), np.nan)
        for members in _groups(rewards, labels):
            found[members] = self.of(rewards[members])
        return found

    @abstractmethod
    def of(self, rewards: np.ndarray) -> np.ndarray:
        """Utilities, float64 [m], of m >= 1 finite rewards that are compared."""


def _groups(rewards: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """For each label with finite rewards, their places."""
    known = np.flatnonzero(np.isfinite(rewards))
    order = known[np.argsort(labels[known], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


class Cvar(Utility):
    """min(r, q) / level, where q is the quantile at the level: only the worst rewards count (arXiv
    2511.22640)."""

    def __init__(self, level: float = 0.5, over: Whose = "group"):
        check_range("level", level, above=0, below=1)
        self.level, self.over = level, over

    def of(self, rewards):
        return np.minimum(rewards, _quantile(rewards, self.level)) / self.level


class Superquantile(Utility):
    """max(r, q) / (1 - level), where q is the quantile at the level: only the best rewards count
    (arXiv 2511.22640)."""

    def __init__(self, level: float = 0.5, over: Whose = "group"):
        check_range("level", level, above=0, below=1)
        self.level, self.over = level, over

    def of(self, rewards):
        return np.maximum(rewards, _quantile(rewards, self.level)) / (1 - self.level)


def _quantile(rewards: np.ndarray, level: float) -> float:
    """The quantile, or the lower of the two rewards that it lies between."""
    # A reward that occurs, and not an interpolated one: equal rewards then stay exactly equal.
    return float(np.quantile(rewards, level, method="lower"))


class MeanVariance(Utility):
    """r - coef (r - mean)^2: rewards far from the mean, on either side, have less utility (arXiv
    2511.22640)."""

    def __init__(self, coef: float = 1.0, over: Whose = "group"):
        check_range("coef", coef, above=0)
        self.coef, self.over = coef, over

    def of(self, rewards):
        return rewards - self.coef * (rewards - rewards.mean()) ** 2


class WinRate(Utility):
    """The share of the others in its group that a reward is greater than; equal rewards count half
    (Pref-GRPO, arXiv 2508.20751)."""

    def of(self, rewards):
        # The - 1 takes out the reward itself, which is equal to itself.
        beaten = (rewards[:, None] > rewards).sum(1) + (
            (rewards[:, None] == rewards).sum(1) - 1
        ) / 2
        return beaten / max(len(rewards) - 1, 1)


class Novelty(Utility):
    """r + coef times the mean distance of the image to the others of its group; the distance is a
    root mean square difference of pixels in [0, 1]."""

    needs_novelty = True

    def __init__(self, coef: float = 1.0):
        check_range("coef", coef, above=0)
        self.coef = coef

    def __call__(self, rewards, labels, novelty=None):
        return rewards + self.coef * np.nan_to_num(novelty)

    def of(self, rewards):
        return rewards


TYPES = {
    "cvar": Cvar,
    "mean_variance": MeanVariance,
    "novelty": Novelty,
    "superquantile": Superquantile,
    "win_rate": WinRate,
}


def make(given: str | dict | None) -> Utility | None:
    """The utility that the value of an option names, or None.

    Args:
        given: a type, a table of a type and its options, or None.

    Raises:
        UserError: the type or an option is wrong; the message begins with "utility".
    """
    if given is None:
        return None
    options = dict(given) if isinstance(given, dict) else {"type": given}
    kind = options.pop("type", None)
    if not isinstance(kind, str) or kind not in TYPES:
        raise UserError(
            f"utility: expected null, {', '.join(TYPES)}, or a table of such a type and its"
            f" options, got {shown(given)}"
        )
    check_options("utility", TYPES[kind], options, also=("type",))
    try:
        return TYPES[kind](**options)
    except UserError as error:
        raise UserError(f"utility.{error}") from error
