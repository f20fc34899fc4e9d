"""The data that the parts of a run hand to each other: frozen, with the meaning of every field
beside it.

Nothing here computes a method. A plan makes rows, `sampling.scheduler` turns rows into states,
`Slots` numbers their children alike on every rank, rewards and advantages are arrays over those
slots, and an objective weighs states with them.
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
    """Of one image, or of one video."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    frames: int = 1
    """1 for an image."""

    def __str__(self) -> str:
        return f"{self.height} x {self.width}" + (
            f" x {self.frames} frames" if self.frames > 1 else ""
        )


class Scales(float):
    """The guidance scales of a denoiser's two experts: the first one's as a number, which says
    whether there is guidance, and `second`."""

    second: float

    def __new__(cls, first: float, second: float) -> Scales:
        made = super().__new__(cls, first)
        made.second = second
        return made


@dataclass(frozen=True)
class Example:
    """What the model is asked for: a prompt, and what stands beside it in the prompt file."""

    text: str
    negative: str | None = None
    """What to guide away from, for families with classifier-free guidance; None: the family's
    default."""
    images: tuple[str | Path | np.ndarray, ...] = ()
    """Condition images, for families that edit: files, or uint8 [H, W, 3]."""
    metadata: dict = field(default_factory=dict)
    """Everything else that the prompt file says; "source" is "file:line", or "dataset[split]:row"
    from row 0."""

    @property
    def for_rewards(self) -> dict:
        """What rewards are told of the example: its metadata, and its condition images under
        "images" where there are any: a list of paths, and of uint8 arrays [H, W, 3] where they came
        as arrays."""
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
        """SHA-256 of each condition image. RankError for a file that cannot be read."""
        return tuple(map(_digest, self.images))


def _digest(image: str | Path | np.ndarray) -> str:
    if isinstance(image, np.ndarray):
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
    """Once for the many prompts that edit one image; state: what tells the file from another of its
    name."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Unit:
    """One (prompt, seed) of an iteration: what is dealt to ranks."""

    index: int
    """Its place in the iteration."""
    prompt: int
    """Its prompt's place among the iteration's prompts."""
    prompt_id: int
    """Its prompt's place in the prompt file."""
    seed: int


@dataclass(frozen=True)
class Row:
    """One latent that is integrated to sigma = 0."""

    unit: Unit
    """The unit whose initial noise it starts from."""
    start: int = 0
    """The step at which it leaves its parent; of a row without one the step at which it begins: 0,
    or that of a latent which the scheduler is given for it."""
    noise: frozenset[int] = frozenset()
    """The steps that it takes by the SDE; all others follow the ODE. A child's first step is
    `start`."""
    parent: int | None = None
    """The row that it branches off, by its place in the list of the unit's rows; None: it starts
    from the initial noise."""
    path: tuple[int, ...] = ()
    """Names its noise: two rows of a unit that take noise at the same step need different paths."""
    value: bool = False
    """Whether its reward is the value of the state that it leaves, and part of no slot's: such a
    row takes no noise."""


@dataclass(frozen=True)
class State:
    """What training forwards once: a latent and the B children that left it.

    The scalars tie the children to the velocity there: log p_i is the log density of y_i under N(a
    x + b v, tau^2).
    """

    unit: Unit
    step: int
    """Its place in the sampling grid, which decides its weight in the loss."""
    sigma: float
    a: float
    b: float
    tau: float
    x: torch.Tensor
    """fp32 [...]."""
    children: torch.Tensor
    """fp32 [B, ...]."""
    slots: np.ndarray
    """int [B]: the children's places in `Slots`."""
    log_prob: torch.Tensor | None = None
    """fp32 [B], under the rollout's own velocity; None where the rollout has none."""


@dataclass(frozen=True)
class Endpoint:
    """A row that has reached sigma = 0, for objectives that learn from finished latents."""

    unit: Unit
    latent: torch.Tensor
    """fp32 [...]."""
    slot: int
    """Its place in `Slots`."""


@dataclass(frozen=True)
class Slots:
    """One line per child of a state, of all ranks and the same on every rank: what rewards and
    advantages are arrays over."""

    prompt: np.ndarray
    """int [n]: place among the iteration's prompts."""
    seed: np.ndarray
    """int [n]."""
    step: np.ndarray
    """int [n]: the step at which the child took its noise; -1 where the slots are endpoints."""
    state: np.ndarray
    """int [n]: number of the state that it left."""
    child: np.ndarray
    """int [n]: its number among the state's children."""
    leaves: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    """n tuples: the rows below it, numbered over all units, whose rewards are its own."""
    before: np.ndarray | None = field(repr=False, default=None)
    """int [n]: the row whose reward is the value of the state that it left, numbered alike; -1
    where there is none. None: the plan has no values."""
    after: np.ndarray | None = field(repr=False, default=None)
    """int [n]: the row whose reward is its own value: that of the next state on its way, or its own
    end after the last one."""

    OVER: ClassVar = {
        "state": ("state",),
        "seed": ("prompt", "seed", "step"),
        "prompt": ("prompt", "step"),
        "step": ("step",),
    }

    def __len__(self) -> int:
        return len(self.state)

    def groups(self, over: str, by_step: bool = True) -> np.ndarray:
        """int [n], labels from 0 on in order of first appearance: slots whose rewards are
        normalized together.

        "state" has the children of one state together, "seed" those of one prompt, seed and step,
        "prompt" those of one prompt and step, "step" all of one step. Without by_step the steps of
        each are together.
        """
        names = [name for name in self.OVER[over] if by_step or name != "step"]
        keys = np.stack(
            [getattr(self, name) for name in names] or [np.zeros_like(self.step)], axis=1
        )
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[inverse.reshape(-1)]

    def steps(self) -> list[int]:
        """The different steps, rising."""
        return np.unique(self.step).tolist()

    def means(self, rewards: np.ndarray) -> np.ndarray:
        """Each slot's reward, [n], from those of all rows: the mean of the finite ones below it;
        NaN where none is.

        rewards: float64 [..., rows]. Returns [..., n].
        """
        if all(len(rows) == 1 for rows in self.leaves):
            return rewards[..., [rows[0] for rows in self.leaves]]
        found = np.full((*rewards.shape[:-1], len(self)), np.nan)
        for slot, rows in enumerate(self.leaves):
            below = rewards[..., list(rows)]
            known = np.isfinite(below)
            np.divide(
                np.where(known, below, 0.0).sum(-1),
                known.sum(-1),
                out=found[..., slot],
                where=known.any(-1),
            )
        return found

    def values(self, rewards: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(before, after), [n] each, from the rewards [rows] of all rows; NaN where one is missing,
        None without values."""
        if self.before is None or self.after is None:
            return None, None
        before, after = (
            np.where(rows >= 0, rewards[rows], np.nan) for rows in (self.before, self.after)
        )
        return before, after


@dataclass(frozen=True)
class Rewards:
    """Rewards of all ranks by slot; NaN where one failed."""

    total: np.ndarray
    """float64 [n]: the weighted sum."""
    parts: dict[str, np.ndarray]
    """float64 [n] each: every reward that is trained on, unweighted."""
    weights: dict[str, float]
    applies: dict[str, np.ndarray]
    """bool [n] each: whether the reward is for the slot's prompt."""
    before: np.ndarray | None = None
    """float64 [n]: `total` of the ODE's completion of the state that the slot left; None where the
    plan has no values."""
    after: np.ndarray | None = None
    """float64 [n]: and of that of the slot's own latent."""
    novelty: np.ndarray | None = None
    """float64 [n]: mean distance of the slot's image to the others of its group; NaN where there is
    none, None where nobody asked."""


@dataclass(frozen=True)
class Advantages:
    """What an iteration learns from, by slot."""

    values: np.ndarray
    """float32 [n]; 0 where masked."""
    valid: np.ndarray
    """bool [n]: False where a reward failed."""
    zero_spread: np.ndarray
    """bool [groups]: groups whose valid rewards are all equal."""
    spread: dict[int, float]
    """Mean standard deviation of the groups of each step; NaN where none is valid."""
