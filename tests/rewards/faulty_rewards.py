"""Rewards that fail in every way the pool must survive; named by dotted path in the tests."""

import ctypes
import os
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np

from tempflow.rewards import Reward, Scores


def first_pixel(images, prompts, metadata, scale: float = 1.0):
    """A reward that works, as a plain function."""
    return images[:, 0, 0, 0] * scale


class Environment(Reward):
    """Reports what the worker sees."""

    def load(self, threads=1):
        self.threads = threads

    def score(self, images, prompts, metadata):
        seen = [
            f"torch={'torch' in sys.modules}",
            f"threads={self.threads}",
            f"OMP={os.environ.get('OMP_NUM_THREADS')}",
            f"CUDA={os.environ.get('CUDA_VISIBLE_DEVICES')!r}",
            f"RANK={os.environ.get('RANK')}",
        ]
        return Scores(np.ones(len(images)), [" ".join(seen)] * len(images))


class Faulty(Reward):
    """Does `fault` the first `times` times (counted in the file `counter`), then scores 1."""

    def __init__(self, fault: str, counter: str, times: int = 1):
        self.fault, self.counter, self.times = fault, Path(counter), times

    def score(self, images, prompts, metadata):
        n = len(images)
        with self.counter.open("a") as file:
            file.write("x")
        if self.counter.stat().st_size > self.times:
            return np.ones(n)
        return getattr(self, self.fault)(n)

    def raising(self, n):
        raise ValueError("no idea")

    def nan(self, n):
        return np.full(n, np.nan)

    def infinite(self, n):
        return np.full(n, np.inf)

    def short(self, n):
        return np.ones(n + 1)

    def text(self, n):
        return ["good"] * n

    def hanging(self, n):
        time.sleep(3600)

    def killed(self, n):
        os.kill(os.getpid(), signal.SIGKILL)

    def garbling(self, n):
        os.write(int(sys.argv[1]), struct.pack("!i", 3) + b"abc")  # into the worker's pipe
        return np.ones(n)

    def crashing(self, n):
        print("about to crash", flush=True)
        ctypes.string_at(0)


class PartlyNan(Reward):
    """Cannot score the first picture of a batch."""

    def score(self, images, prompts, metadata):
        return [float("nan")] + [1.0] * (len(images) - 1)


class Unscored(Reward):
    """Says of every picture why it has no score."""

    def score(self, images, prompts, metadata):
        return Scores(
            np.full(len(images), np.nan), [f"not scored: no {prompt}" for prompt in prompts]
        )


class Slow(Reward):
    def __init__(self, seconds: float):
        self.seconds = seconds

    def score(self, images, prompts, metadata):
        time.sleep(self.seconds)
        return np.ones(len(images))


class NeverStarts(PartlyNan):
    def load(self, threads=1):
        raise ImportError("No module named 'left_pad'")


class StartsSlowly(PartlyNan):
    def load(self, threads=1):
        time.sleep(3600)


class NotAReward:
    pass


class NoScore(Reward):
    pass


def answer(images, prompts, metadata, kind: str):
    """What people return who have not read the interface."""
    n = len(images)
    if kind == "raises":
        raise RuntimeError("no face in the image")
    return {
        "column": np.ones((n, 1)),
        "row": np.ones((1, n)),
        "number": 1.0,
        "text": ["good"] * n,
        "nothing": None,
        "table": {"score": [1.0] * n},
        "short": [1.0] * (n - 1),
        "nan": [np.nan] * n,
        "infinite": [np.inf] * n,
        "fine": [True] * n,
    }[kind]


def only(images, prompts, metadata, word: str, value: float):
    """A constant; AssertionError for a prompt without the word, which must not be asked about."""
    assert (
        all(word in prompt for prompt in prompts)
        and len(prompts) == len(metadata) == len(images) > 0
    ), prompts
    return [value] * len(images)
