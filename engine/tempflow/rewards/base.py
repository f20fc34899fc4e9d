"""The interface between the trainer and everything that scores images.

An image that could not be scored has the value NaN, which the trainer masks. It never gets the
value 0: images of a group are compared with each other, so a false 0 would be a strong signal in
the wrong direction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from tempflow.errors import shown


@dataclass(frozen=True)
class Scores:
    """The scores of n images by one reward."""

    values: np.ndarray
    """float32 [n]; NaN for an image that could not be scored."""
    details: list[str] | None = None
    """For each image a short text for people, such as what an OCR model read; None: no texts."""
    applies: np.ndarray | None = None
    """bool [n], whether the image's prompt asks for this reward; None: all do. Rewards leave it
    out; the pool sets it."""
    maps: np.ndarray | None = None
    """float32 [n, h, w]: what each place of an image is worth, in the units of `values`, on any
    grid of h x w equal cells; rows of images without a value mean nothing. None: every place is
    worth the image's value. A reward that returns them says so by `makes_maps`."""

    def applicable(self) -> np.ndarray:
        """`applies` as an array, bool [n]."""
        return np.ones(len(self.values), dtype=bool) if self.applies is None else self.applies


class BadScores(ValueError):
    """A reward returned the wrong type or shape, which trying again would not change."""


class Reward(ABC):
    """Base class of rewards. A subclass must define `score`.

    The constructor's keyword arguments are the reward's options in the config. The constructor must
    be cheap and load nothing, because the training process builds every reward too, only to call
    `check_prompts`. If the constructor or `load` raises `UserError`, the message is shown after the
    entry's key; it should begin with the option at fault, as in "url: expected ..., got ...".
    """

    makes_maps = False
    """Whether `score` returns `Scores.maps`, for `training.advantage` "spatial". Where no reward
    does, the start of such a run tells that images count as a whole."""
    takes_videos = False
    """Whether `score` also takes videos, [n, F, H, W, 3]. A reward that does not can score frames
    of videos, as many as its config entry's `frames` says; without that it is refused in a run of
    videos."""

    def check_prompts(  # noqa: B027 (optional)
        self, prompts: list[str], metadata: list[dict]
    ) -> str | None:
        """Refuse prompts that this reward cannot use. Called before anything is loaded.

        Args:
            prompts: n texts.
            metadata: n tables: the other keys of each prompt's line.

        Returns:
            A line for people about what was found in the prompts, which is shown at the start, or
            None.

        Raises:
            UserError: names the first unusable prompt; see `locate`.
        """

    def load(self, threads: int = 1) -> None:  # noqa: B027
        """Load models. Called once, in the process that will score.

        Args:
            threads: CPU threads that the reward may use.
        """

    @abstractmethod
    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        """Score a batch of images, or of videos if `takes_videos`.

        An exception fails the whole batch, which is then tried again; NaN fails one image.

        Args:
            images: uint8 RGB [n, H, W, 3]; videos [n, F, H, W, 3].
            prompts: n texts.
            metadata: n tables. A prompt's condition images are under "images"; read them with
                `condition_images`.

        Returns:
            `Scores`, or a plain array or list of n numbers.
        """


class FunctionReward(Reward):
    """Makes a reward of a plain function `f(images, prompts, metadata, **options)`."""

    def __init__(self, function, options: dict):
        self._function = function
        self.takes_videos = getattr(function, "takes_videos", False)
        self.makes_maps = getattr(function, "makes_maps", False)
        self._options = options

    def score(self, images, prompts, metadata):
        return self._function(images, prompts, metadata, **self._options)


def as_scores(result, n: int) -> Scores:
    """Check what a reward's `score` returned, and convert it to `Scores`.

    A value that is infinite, too large for float32, or masked by numpy becomes NaN: that image
    counts as failed.

    Args:
        result: `Scores`, an array, a list, or a torch tensor.
        n: number of images in the batch.

    Raises:
        BadScores: unless `result` has n real numbers and, if any, n texts and n maps.
    """
    details = maps = None
    if isinstance(result, Scores):
        result, details, maps = result.values, result.details, result.maps
    # A torch tensor, recognized without importing torch, which costs a worker seconds and memory.
    # `float()` because numpy has no bfloat16.
    if hasattr(result, "detach"):
        result = result.detach().cpu().float().numpy()
    try:
        values = np.asarray(result)
    except ValueError:  # ragged lists; refused below by their dtype
        values = np.empty(0, dtype=object)
    # `asarray` drops the mask and keeps the numbers under it, which mean nothing.
    masked = np.ma.getmaskarray(result) if isinstance(result, np.ma.MaskedArray) else None
    if values.dtype.kind not in "fiub":  # floats, integers, unsigned integers, booleans
        raise BadScores(f"the reward returned {shown(result)}, not {n} numbers")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite
        values = values.astype(np.float32)
    if values.shape != (n,):
        raise BadScores(
            f"the reward returned shape {list(values.shape)} for {n} images, expected [{n}]"
        )
    if masked is not None:
        values = np.where(masked, np.float32(np.nan), values)
    if details is not None and len(details) != n:
        raise BadScores(f"the reward returned {len(details)} details for {n} images")
    infinite = np.isinf(values)
    if infinite.any():
        values = np.where(infinite, np.float32(np.nan), values)
        told = details if details is not None else [""] * n
        details = [
            "not scored: an infinite value" if bad else text
            for bad, text in zip(infinite, told, strict=True)
        ]
    if maps is not None:
        values, maps = _checked_maps(values, np.asarray(maps, dtype=np.float32))
    return Scores(values, None if details is None else [str(text) for text in details], maps=maps)


def _checked_maps(values: np.ndarray, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and maps, with NaN as the value of an image whose map is not finite."""
    if maps.ndim != 3 or len(maps) != len(values) or maps.size == 0 < len(values):
        raise BadScores(
            f"the reward returned maps of shape {list(maps.shape)} for {len(values)} images,"
            f" expected [{len(values)}, h, w]"
        )
    finite = np.isfinite(maps.reshape(len(maps), -1)).all(1)
    return np.where(finite, values, np.float32(np.nan)), maps


def joined(parts: list[Scores]) -> Scores:
    """The scores of several batches as one, in their order; with details only if every batch has
    them. Without maps: these stay in a run, whose batches are not joined."""
    told = [part.details for part in parts if part.details is not None]
    details = [text for texts in told for text in texts] if len(told) == len(parts) else None
    return Scores(np.concatenate([part.values for part in parts]), details)


def locate(prompt: str, metadata: dict) -> str:
    """A prompt's name in error messages: its file and line, if known, and its text."""
    source = metadata.get("source")
    return (f"{source}: " if source else "") + f"prompt {shown(prompt)}"
