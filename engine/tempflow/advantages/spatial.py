"""Advantages for each place of an image, from rewards that say what each place is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tempflow.advantages.base import EPSILON, Advantage, Over, clipped, normalize
from tempflow.errors import check_range
from tempflow.types import Advantages, Rewards, Slots


class Spatial(Advantage):
    """An advantage for each place of a latent: what the place is worth, compared with the same
    place of the group's other images.

    A place of the latent is credited with the part of the image that it becomes, so what happens
    elsewhere in the image adds no noise to it. Needs a reward that makes maps; a reward without
    counts with its value at every place. The distances from the mean are divided by their root
    mean square over all places of the iteration's images, so groups that differ more count more.

    Args:
        over: whose maps are compared: "seed", those of the children of one state; or "prompt",
            those of a prompt at a step.
        clip: advantages are clipped to +- this.
    """

    needs_maps = True

    def __init__(self, over: Over = "seed", clip: float = 5.0):
        check_range("clip", clip, above=0)
        self.over, self.clip = over, clip

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        assert rewards.maps is not None  # `needs_maps`
        labels = slots.groups(self.over)
        whole = normalize(rewards.total, labels)
        apart = _from_mean(rewards.maps.reshape(len(slots), -1), labels, whole.valid)
        # Not within each group: reading probabilities always differ a little, and dividing by the
        # group's own scale would blow up groups whose images are all equally good.
        scale = np.sqrt((apart[whole.valid] ** 2).mean()) if whole.valid.any() else 0.0
        maps = np.clip(apart / (scale + EPSILON), -self.clip, self.clip)
        found = clipped(whole.values, whole.flat, whole, slots, self.clip)
        return replace(found, maps=maps.astype(np.float32).reshape(rewards.maps.shape))


def _from_mean(values: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """values [n, P] minus the mean of the group's valid rows at each place; 0 in rows that are not
    valid."""
    known = np.where(valid[:, None], values, 0.0)
    total = np.zeros((labels.max(initial=-1) + 1, values.shape[1]))
    np.add.at(total, labels, known)
    count = np.bincount(labels, weights=valid, minlength=len(total))
    mean = total / np.maximum(count, 1)[:, None]
    return np.where(valid[:, None], known - mean[labels], 0.0)
