"""What a reward is: the one interface between the trainer and anything that judges images.

An image that could not be scored has the value NaN, which the trainer masks. It is never 0: in a
group of images compared with each other a false 0 is a strong signal in the wrong direction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from tempflow.errors import shown


@dataclass(frozen=True)
class Scores:
    """Rewards of n images.

    values: float32 [n]; NaN where an image could not be scored.
    details: one short text an image for people (what an OCR model read), or None.
    applies: bool [n], whether the image's prompt is for this reward, or None: all are. Set by the
    pool; rewards leave it out.
    """

    values: np.ndarray
    details: list[str] | None = None
    applies: np.ndarray | None = None

    def applicable(self) -> np.ndarray:
        """`applies` as an array, bool [n]."""
        return np.ones(len(self.values), dtype=bool) if self.applies is None else self.applies


class BadScores(ValueError):
    """What a reward returned has the wrong type or shape, which no retry changes."""


class Reward(ABC):
    """Base class of rewards; a subclass must define `score`.

    The constructor's keyword arguments are the reward's options in the config. It must be cheap and
    load nothing: the training process builds every reward too, only to call `check_prompts`. A
    `UserError` of the constructor or of `load` is shown after the entry's key; it begins with the
    option at fault, as in "url: expected ..., got ...".

    takes_videos: whether `score` takes videos too, [n, F, H, W, 3]. Of the others an entry of the
        config says how many `frames` of a video they score, one image each; without that the pool
        refuses videos for them.
    """

    takes_videos = False

    def check_prompts(  # noqa: B027 (optional)
        self, prompts: list[str], metadata: list[dict]
    ) -> str | None:
        """Raise `UserError` naming the first prompt that this reward cannot use (see `locate`). May
        return a line for people about what it read from the prompts, which the scripts show before
        they start."""

    def load(self, threads: int = 1) -> None:  # noqa: B027
        """Load models, once, in the process that will score; `threads` is what each may use."""

    @abstractmethod
    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        """Score images, or videos where `takes_videos`.

        images: uint8 RGB [n, H, W, 3], videos [n, F, H, W, 3]; prompts and metadata: n entries
        each. The condition images of a prompt are in its metadata, under "images": see
        `condition_images`. Returns `Scores`; a plain array or list of n numbers does as well. An
        exception fails the whole batch (it is retried); NaN fails one image.
        """


class FunctionReward(Reward):
    """A plain function `f(images, prompts, metadata, **options)` seen as a reward."""

    def __init__(self, function, options: dict):
        self._function = function
        self.takes_videos = getattr(function, "takes_videos", False)
        self._options = options

    def score(self, images, prompts, metadata):
        return self._function(images, prompts, metadata, **self._options)


def as_scores(result, n: int) -> Scores:
    """What `score` returned, checked. Infinity, and what is too large for float32, is a failure of
    that image: NaN. So is what numpy has masked.

    Raises BadScores unless it is n real numbers and, if present, n texts.
    """
    details = None
    if isinstance(result, Scores):
        result, details = result.values, result.details
    if hasattr(result, "detach"):  # a torch tensor, without importing torch
        result = result.detach().cpu().float().numpy()
    try:
        values = np.asarray(result)
    except ValueError:  # ragged lists
        values = np.empty(0, dtype=object)
    # asarray gives what lies under the mask
    masked = np.ma.getmaskarray(result) if isinstance(result, np.ma.MaskedArray) else None
    if values.dtype.kind not in "fiub":
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
    return Scores(values, None if details is None else [str(text) for text in details])


def joined(parts: list[Scores]) -> Scores:
    """The scores of several batches as one, in their order; details where all have some."""
    told = [part.details for part in parts if part.details is not None]
    details = [text for texts in told for text in texts] if len(told) == len(parts) else None
    return Scores(np.concatenate([part.values for part in parts]), details)


def locate(prompt: str, metadata: dict) -> str:
    """How an error message names a prompt: its file and line where known, and its text."""
    source = metadata.get("source")
    return (f"{source}: " if source else "") + f"prompt {shown(prompt)}"
