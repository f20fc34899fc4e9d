"""How different the pictures of one prompt are: the distance that shrinks when a policy collapses onto one picture.

The distance of two pictures is the root mean square difference of their pixels, which lie in [0, 1], after both were averaged
down to at most 32 x 32. That sees layout and colour, not grain, and costs nothing beside a rollout; embeddings would see
meaning as well, at the price of another model on every picture.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 32


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 [n, H, W, 3] averaged down to at most SIDE pixels a side, in [0, 1], as float32 [n, D]."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    sides = [min(SIDE, side) for side in pixels.shape[2:]]
    return F.adaptive_avg_pool2d(pixels, sides).flatten(1).numpy()


def mean_distance(groups: np.ndarray) -> np.ndarray:
    """Mean distance over all pairs within each group of thumbnails. groups: [..., n, D], n from 2 on; returns float64 [...].

    A thumbnail that holds NaN is that of a missing image and in no pair; NaN where a group has no pair.
    """
    *lead, n, size = groups.shape
    points = torch.from_numpy(np.asarray(groups, dtype=np.float64)).reshape(-1, n, size)
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    there = points.isfinite().all(-1)
    pairs = there[:, :, None] & there[:, None, :] & ~torch.eye(n, dtype=torch.bool)
    count = pairs.sum((1, 2))
    total = torch.where(pairs, apart, 0.0).sum((1, 2))
    return torch.where(count > 0, total / count / size**0.5, torch.nan).numpy().reshape(lead)
