"""The data types that the parts of a run exchange.

A plan makes rows, and `sampling.scheduler` turns rows into states. `Slots` numbers the children of
all states in the same way on every rank; rewards and advantages are arrays over these slots, and an
objective computes its loss from states and advantages. The classes are frozen and contain no part
of a method.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tempflow.errors import RankError

if TYPE_CHECKING:  # reading prompts needs no torch
    import torch


@dataclass(frozen=True)
class Size:
    """The size of an image or a video."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    frames: int = 1
    """Number of frames; 1 for an image."""

    def __str__(self) -> str:
        return f"{self.height} x {self.width}" + (
            f" x {self.frames} frames" if self.frames > 1 else ""
        )


class Scales(float):
    """The guidance scales of a denoiser with two experts.

    As a number it is the first expert's scale, so code that only asks whether there is guidance
    need not know about experts. `second` is the second expert's.
    """

    second: float

    # float is immutable, so its value is set in __new__.
    def __new__(cls, first: float, second: float) -> Scales:
        made = super().__new__(cls, first)
        made.second = second
        return made


@dataclass(frozen=True)
class Example:
    """A prompt, with everything that the prompt file has beside it."""

    text: str
    """The prompt."""
    negative: str | None = None
    """The negative prompt, for families with classifier-free guidance; None: the family's
    default."""
    images: tuple[str | Path | np.ndarray, ...] = ()
    """Condition images, for families that edit: files, or arrays uint8 [H, W, 3]."""
    metadata: dict = field(default_factory=dict)
    """All other fields of the prompt file. "source" says where the prompt is from: "file:line", or
    "dataset[split]:row", where rows count from 0."""

    @property
    def for_rewards(self) -> dict:
        """The metadata that rewards get.

        If there are condition images, they are added as "images": a list of paths, or of arrays
        uint8 [H, W, 3].
        """
        if not self.images:
            return self.metadata
        return {
            **self.metadata,
            "images": [
                image if isinstance(image, np.ndarray) else str(image) for image in self.images
            ],
        }

    @cached_property
    def image_digests(self) -> tuple[str, ...]:
        """SHA-256 of each condition image, in hexadecimal digits.

        Raises RankError for a file that cannot be read.
        """
        return tuple(map(_digest, self.images))


def _digest(image: str | Path | np.ndarray) -> str:
    if isinstance(image, np.ndarray):
        # With dtype and shape: arrays of different shapes may have the same bytes.
        return hashlib.sha256(
            f"{image.dtype} {image.shape} ".encode() + image.tobytes()
        ).hexdigest()
    try:
        found = os.stat(image)
        return _digest_of_file(os.fspath(image), found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise RankError(f"image {image}: cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=1 << 16)
def _digest_of_file(file: str, *state: int) -> str:
    """SHA-256 of a file, computed once although many prompts may edit the same image.

    state: inode, size and modification time, by which a file that was replaced has another key.
    """
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Unit:
    """A prompt and a seed of an iteration. Units are distributed over ranks, each as a whole."""

    index: int
    """Its number in the iteration."""
    prompt: int
    """The prompt's number in the iteration."""
    prompt_id: int
    """The prompt's number in the prompt file."""
    seed: int
    """The seed's number among those of the prompt, from 0 on."""


# Stands for every unit where only the form of its rows matters, which all units share.
ANY_UNIT = Unit(0, 0, 0, 0)


@dataclass(frozen=True)
class Row:
    """One latent that is integrated to sigma = 0."""

    unit: Unit
    """The unit whose initial noise it starts from."""
    start: int = 0
    """The step at which it leaves its parent. Without a parent the step at which it begins: 0, or
    the step of a latent that is given to the scheduler."""
    noise: frozenset[int] = frozenset()
    """The steps that it takes by the SDE; it takes all others by the ODE. A child's first step is
    `start`."""
    parent: int | None = None
    """Index of the row that it branches off, in the list of the unit's rows; None: it starts from
    the initial noise."""
    path: tuple[int, ...] = ()
    """Identifies its noise: two rows of a unit that take noise at the same step need different
    paths."""
    value: bool = False
    """Whether its reward is the value of the state that it leaves, and no slot's reward. Such a row
    takes no noise."""


@dataclass(frozen=True)
class State:
    """A latent x and its B children y_i. Training forwards it once for all children.

    The children depend on the velocity v at x: log p_i is the log density of y_i under
    N(a x + b v, tau^2).
    """

    unit: Unit
    step: int
    """The step of the sampling grid, which determines its weight in the loss."""
    sigma: float
    """The noise level of x."""
    a: float
    b: float
    tau: float
    """Standard deviation of the step's noise."""
    x: torch.Tensor
    """fp32 [...], one latent."""
    children: torch.Tensor
    """fp32 [B, ...]."""
    slots: np.ndarray
    """int [B]: the children's indices in `Slots`."""
    log_prob: torch.Tensor | None = None
    """fp32 [B], under the rollout's own velocity; None if the rollout did not compute it."""


@dataclass(frozen=True)
class Endpoint:
    """A finished latent, at sigma = 0, for objectives that learn from those."""

    unit: Unit
    latent: torch.Tensor
    """fp32 [...], one latent."""
    slot: int
    """Its index in `Slots`."""


@dataclass(frozen=True)
class Slots:
    """The n children of all states of an iteration, with the same numbers on every rank.

    Rewards and advantages are arrays over slots. They cover the children of all ranks, so that
    groups can be normalized without regard to which rank sampled what.
    """

    prompt: np.ndarray
    """int [n]: the prompt's number in the iteration."""
    seed: np.ndarray
    """int [n]: the seed's number among those of the prompt."""
    step: np.ndarray
    """int [n]: the step at which the child took its noise; -1 if slots are finished latents."""
    state: np.ndarray
    """int [n]: number of the state that the child left."""
    child: np.ndarray
    """int [n]: the child's number among those of the state."""
    leaves: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    """n tuples of rows, numbered over all units: the child's own row and those that branch off
    later. The mean of their rewards is the slot's reward."""
    before: np.ndarray | None = field(repr=False, default=None)
    """int [n]: the row whose reward is the value of the state that the child left, numbered in the
    same way; -1 if there is none. None: the plan has no values."""
    after: np.ndarray | None = field(repr=False, default=None)
    """int [n]: the row whose reward is the child's own value: that of the next state on its path,
    or its own final image if no state follows."""

    # By name of a grouping: the fields in which all slots of a group are equal.
    OVER: ClassVar = {
        "state": ("state",),
        "seed": ("prompt", "seed", "step"),
        "prompt": ("prompt", "step"),
        "step": ("step",),
    }

    def __len__(self) -> int:
        return len(self.state)

    def groups(self, over: str, by_step: bool = True) -> np.ndarray:
        """Label the slots by group; rewards are normalized within groups.

        Args:
            over: "state" groups the children of one state, "seed" those of one prompt, seed and
                step, "prompt" those of one prompt and step, "step" all children at one step.
            by_step: False joins the groups that differ by step alone.

        Returns:
            int [n], labels from 0 on, in order of first appearance.
        """
        names = [name for name in self.OVER[over] if by_step or name != "step"]
        keys = np.stack(
            [getattr(self, name) for name in names] or [np.zeros_like(self.step)], axis=1
        )
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        # np.unique labels by sorted key; the rank of a label's first place gives order of
        # appearance. reshape, because some numpy versions return `inverse` with two dimensions.
        return np.argsort(np.argsort(first))[inverse.reshape(-1)]

    def steps(self) -> list[int]:
        """The different steps, in rising order."""
        return np.unique(self.step).tolist()

    def means(self, rewards: np.ndarray) -> np.ndarray:
        """Compute each slot's reward: the mean of the finite rewards of its leaves.

        Args:
            rewards: float64 [..., rows], NaN where one failed.

        Returns:
            float64 [..., n], NaN for slots without a finite reward.
        """
        # The common case, without trees: no mean, and so no rounding.
        if all(len(rows) == 1 for rows in self.leaves):
            return rewards[..., [rows[0] for rows in self.leaves]]
        found = np.full((*rewards.shape[:-1], len(self)), np.nan)
        for slot, rows in enumerate(self.leaves):
            below = rewards[..., list(rows)]
            # Not nanmean, which warns about slots whose every reward failed.
            known = np.isfinite(below)
            np.divide(
                np.where(known, below, 0.0).sum(-1),
                known.sum(-1),
                out=found[..., slot],
                where=known.any(-1),
            )
        return found

    def values(self, rewards: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The values of the states before and after each child.

        Args:
            rewards: float64 [rows].

        Returns:
            (before, after), float64 [n] each, NaN where one is missing; (None, None) if the plan
            has no values.
        """
        if self.before is None or self.after is None:
            return None, None
        # rows is -1 where a value is missing; indexing with it is harmless, `where` drops it.
        before, after = (
            np.where(rows >= 0, rewards[rows], np.nan) for rows in (self.before, self.after)
        )
        return before, after


@dataclass(frozen=True)
class Rewards:
    """The rewards of all n slots, of all ranks; NaN where one failed."""

    total: np.ndarray
    """float64 [n]: the weighted sum of the rewards."""
    parts: dict[str, np.ndarray]
    """float64 [n] by reward, unweighted; without rewards of weight 0."""
    weights: dict[str, float]
    """The weight of each reward."""
    applies: dict[str, np.ndarray]
    """bool [n] by reward: whether the reward applies to the slot's prompt."""
    before: np.ndarray | None = None
    """float64 [n]: `total` of the image to which the ODE leads from the state that the slot left;
    None if the plan has no values."""
    after: np.ndarray | None = None
    """float64 [n]: the same from the slot's own latent."""
    novelty: np.ndarray | None = None
    """float64 [n]: mean distance of the slot's image from the other images of its group; NaN if
    there are none. None if the advantage does not use it."""
    maps: np.ndarray | None = None
    """float64 [n, rows, columns]: `total` for each place of the latent, NaN where a reward failed;
    None if the advantage does not use it."""
    colors: np.ndarray | None = None
    """float64 [n, 3] in [0, 1]: mean color of the slot's image; NaN where there is none. None if
    the advantage does not use it."""

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """`before` and `after`, for advantages with `needs_values`, which a config may combine only
        with plans that have values."""
        assert self.before is not None and self.after is not None
        return self.before, self.after


@dataclass(frozen=True)
class Advantages:
    """The advantages of all n slots."""

    values: np.ndarray
    """float32 [n]; 0 for slots that are not valid."""
    valid: np.ndarray
    """bool [n]: False if the reward failed. Such slots are masked in the loss."""
    zero_spread: np.ndarray
    """bool [groups]: whether the valid rewards of a group are all equal."""
    spread: dict[int, float]
    """By step: mean standard deviation of the rewards within groups; NaN if none is valid."""
    maps: np.ndarray | None = None
    """float32 [n, rows, columns]: an advantage for each place of the latent, which objectives use
    in place of `values`; 0 for slots that are not valid. None: `values` holds for every place."""
