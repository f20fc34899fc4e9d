"""How different the images of one prompt are: the distance that shrinks when a policy collapses onto one image.

The distance of two images is the root mean square difference of their pixels, which lie in [0, 1], after both were averaged
down to at most 32 x 32; that of two videos takes a few frames of each. That sees layout and color, not grain, and costs nothing
beside a rollout; embeddings would see meaning as well, at the price of another model on every image.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from tempflow.media import some_frames

SIDE = 32  # pixels of a thumbnail, at most
FRAMES = 4  # of a video, at most


def thumbnails(media: np.ndarray) -> np.ndarray:
    """Images or videos averaged down to at most SIDE pixels a side, in [0, 1], as float32 [n, D]."""
    frames = some_frames(media, FRAMES)
    pixels = torch.from_numpy(frames).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    sides = [min(SIDE, side) for side in pixels.shape[2:]]
    return F.adaptive_avg_pool2d(pixels, sides).reshape(len(media), -1).numpy()


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
