"""Advantages for each place of an image, from rewards that say what each place is worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from tempflow.advantages.base import EPSILON, Advantage, Over, clipped, normalize
from tempflow.errors import check_range
from tempflow.types import Advantages, Rewards, Slots

# Images more than groups that a fit to colors needs. Of F numbers that are free a fit of six takes
# 6 / F away by chance alone: here a quarter.
FEWEST = 24


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
        blind_to: "color" takes out of the advantages what the images' mean colors explain of them,
            by a fit of six numbers to the iteration's images, so that no color is preferred; null:
            nothing, as in an iteration with fewer than 24 more images than groups.
    """

    needs_maps = True

    def __init__(
        self, over: Over = "seed", clip: float = 5.0, blind_to: Literal["color", None] = None
    ):
        check_range("clip", clip, above=0)
        self.over, self.clip, self.needs_colors = over, clip, blind_to == "color"

    def __call__(self, slots: Slots, rewards: Rewards) -> Advantages:
        assert rewards.maps is not None  # `needs_maps`
        labels = slots.groups(self.over)
        whole = normalize(rewards.total, labels)
        apart = _from_mean(rewards.maps.reshape(len(slots), -1), labels, whole.valid)
        if rewards.colors is not None:
            apart -= _of_color(apart.mean(1), rewards.colors, labels, whole.valid)[:, None]
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


def _of_color(
    apart: np.ndarray, colors: np.ndarray, labels: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """The part of the distances [n] from a group's mean that a linear function of the images'
    colors [n, 3] explains, float64 [n]; the function is fitted over all groups.

    It has three slopes for a color's distance from its group's mean, which hold for all groups, and
    three for that distance times the group's mean color: where dark images get darker and light
    ones lighter, or all approach one color, the slopes depend on the color.
    """
    known = valid & np.isfinite(colors).all(1)
    if known.sum() - len(np.unique(labels[known])) < FEWEST:
        return np.zeros(len(apart))
    away = _from_mean(colors, labels, known)
    group = np.where(known[:, None], colors - away, 0.0)
    group -= group[known].mean(0)
    # To a size of about 1, but differences that are only rounding stay small, and the last term
    # of the normal equations then keeps their slopes at 0; it does so with columns that depend on
    # each other too, such as those of gray images.
    features = np.concatenate([away, away * group], 1)[known]
    features /= np.sqrt((features**2).mean(0)) + 1e-6
    square = features.T @ features + 1e-6 * len(features) * np.eye(6)
    found = np.zeros(len(apart))
    found[known] = features @ np.linalg.solve(square, features.T @ apart[known])
    return found
