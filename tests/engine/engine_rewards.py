"""Rewards for runs under test: smooth in the pixels, so that rounding elsewhere stays rounding
here, and quick."""

import os
import signal
from pathlib import Path

import numpy as np

from tempflow.rewards import Reward, Scores


def contrast(images, prompts, metadata):
    """Mean brightness of the left half over that of the right, in percent."""
    brightness = images.astype(np.float64).mean(axis=(1, 3)) / 2.55
    half = brightness.shape[1] // 2
    return brightness[:, :half].mean(axis=1) - brightness[:, half:].mean(axis=1)


def warmth(images, prompts, metadata):
    """Mean red over mean blue, in percent."""
    return (
        images[..., 0].mean(axis=(1, 2), dtype=np.float64)
        - images[..., 2].mean(axis=(1, 2), dtype=np.float64)
    ) / 2.55


def warmth_by_place(images, prompts, metadata):
    """`warmth`, and that of each quarter of an image."""
    quarters = images.reshape(len(images), 2, images.shape[1] // 2, 2, -1, 3)
    red, _, blue = np.moveaxis(quarters.mean(axis=(2, 4), dtype=np.float64), -1, 0)
    return Scores(warmth(images, prompts, metadata), maps=(red - blue) / 2.55)


warmth_by_place.makes_maps = True


def contrast_of_some(images, prompts, metadata):
    """`contrast`; of words that say so, the same for every picture."""
    flat = {"FLAT": 100.0, "EVEN": -100.0}
    values = contrast(images, prompts, metadata)
    return np.array(
        [
            next((x for word, x in flat.items() if word in p), value)
            for value, p in zip(values, prompts, strict=True)
        ]
    )


def now_and_then(images, prompts, metadata):
    """`contrast`, which fails for about a quarter of the images, by their pixels."""
    failed = images.sum(axis=(1, 2, 3), dtype=np.int64) % 4 == 0
    return np.where(failed, np.nan, contrast(images, prompts, metadata))


def never(images, prompts, metadata):
    """For where a reward must not be asked."""
    raise AssertionError("scored")


class Signalling(Reward):
    """`contrast`, but batch number `at`, or each of several, of process `rank` sends that process a
    signal; a file counts them.

    Meant for reward_pool.workers = 0, where the process is the one that trains. The file outlives
    the process, so a resumed run is left alone.
    """

    def __init__(
        self, counter: str, at: int | list[int], signal_name: str = "SIGTERM", rank: int = 0
    ):
        self.counter, self.at = Path(counter), at if isinstance(at, list) else [at]
        self.signal, self.rank = signal.Signals[signal_name], rank

    def score(self, images, prompts, metadata):
        if int(os.environ.get("RANK", 0)) == self.rank:
            with self.counter.open("a") as file:
                file.write("x")
            if self.counter.stat().st_size in self.at:
                os.kill(os.getpid(), self.signal)
        return contrast(images, prompts, metadata)
