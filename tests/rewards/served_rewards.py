"""Rewards that show what the server does with requests; named by dotted path in the tests."""

import os
import time
from pathlib import Path

import numpy as np

from tempflow.rewards import Reward, Scores


def listed(images, prompts, metadata):
    """The metadata's "value", none where it is null; the size of the batch that it was scored in as
    the detail."""
    if any(entry.get("bad") for entry in metadata):
        raise KeyError("bad metadata")
    if any(entry.get("fatal") for entry in metadata):
        os._exit(3)
    values = [float("nan") if entry["value"] is None else entry["value"] for entry in metadata]
    return Scores(np.array(values), [f"{len(images)} in worker {os.getpid()}"] * len(images))


def slow(images, prompts, metadata):
    """Takes the metadata's "seconds", after it has made its file "begun"."""
    for entry in metadata:
        if "begun" in entry:
            Path(entry["begun"]).touch()
    time.sleep(max(entry.get("seconds", 0) for entry in metadata))
    return np.ones(len(images))


class Seen(Reward):
    """Tells what reached it."""

    def score(self, images, prompts, metadata):
        seen = [
            f"{image.shape} {prompt} {sorted(entry.items())}"
            for image, prompt, entry in zip(images, prompts, metadata)
        ]
        return Scores(images.reshape(len(images), -1).astype(np.float64).mean(1) / 7, seen)


class Still(Reward):
    """Mean level of an image."""

    @staticmethod
    def level(images):
        return images.reshape(len(images), -1).mean(axis=1, dtype=np.float64).astype(np.float32)

    def score(self, images, prompts, metadata):
        assert images.ndim == 4
        told = [
            f"{prompt} {entry} {image.shape}"
            for image, prompt, entry in zip(images, prompts, metadata)
        ]
        return Scores(self.level(images), told)


class Motion(Reward):
    """How much brighter a video ends than it begins."""

    takes_videos = True

    def score(self, images, prompts, metadata):
        return Scores(
            Still.level(images[:, -1]) - Still.level(images[:, 0]),
            [str(video.shape) for video in images],
        )
