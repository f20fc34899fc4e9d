"""Rewards for runs under test: smooth in the pixels, so that rounding elsewhere stays rounding here, and quick."""

import os
import signal
from pathlib import Path

import numpy as np

from tempflow.rewards import Reward


def contrast(images, prompts, metadata):
    """Mean brightness of the left half over that of the right."""
    brightness = images.astype(np.float64).mean(axis=(1, 3)) / 255
    half = brightness.shape[1] // 2
    return brightness[:, :half].mean(axis=1) - brightness[:, half:].mean(axis=1)


class Signalling(Reward):
    """`contrast`, but sends `signal_name` to the process that scores batch `at`, counted over processes in a file."""

    def __init__(self, counter: str, at: int, signal_name: str = "SIGTERM"):
        self.counter, self.at, self.signal = Path(counter), at, signal.Signals[signal_name]

    def score(self, images, prompts, metadata):
        with self.counter.open("a") as file:
            file.write("x")
        if self.counter.stat().st_size == self.at:
            os.kill(os.getpid(), self.signal)
        return contrast(images, prompts, metadata)
