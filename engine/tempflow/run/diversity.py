"""How different images are: the distance that shrinks when a policy collapses onto one image, and
who is near whom.

The distance of two images is the root mean square difference of their pixels, which lie in [0, 1],
after both were averaged down to at most 32 x 32; that of two videos takes a few frames of each.
That sees layout and color, not grain, and costs nothing beside a rollout; embeddings would see
meaning as well, at the price of another model on every image.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from tempflow.media import frame_places

SIDE = 32  # pixels of a thumbnail, at most
FRAMES = 4  # of a video, at most


def thumbnails(media: np.ndarray) -> np.ndarray:
    """Images or videos averaged down to at most SIDE pixels a side, in [0, 1], as float32 [n,
    D]."""
    return thumbnails_there(torch.from_numpy(media)).numpy()


def thumbnails_there(media: torch.Tensor) -> torch.Tensor:
    """`thumbnails` of uint8 [n, H, W, 3] or [n, F, H, W, 3], on their device."""
    if media.ndim == 5:  # frame by frame: a list of places would be copied to a GPU
        places = frame_places(media.shape[1], FRAMES).tolist()
        frames = torch.stack([media[:, place] for place in places], 1)
    else:
        frames = media[:, None]
    pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    sides = min(SIDE, pixels.shape[2]), min(SIDE, pixels.shape[3])
    return F.adaptive_avg_pool2d(pixels, sides).reshape(len(media), -1)


def mean_distance(groups: np.ndarray) -> np.ndarray:
    """Mean distance over all pairs within each group of thumbnails. groups: [..., n, D], n from 2
    on; returns float64 [...].

    A thumbnail that holds NaN is that of a missing image and in no pair; NaN where a group has no
    pair.
    """
    *lead, n, size = groups.shape
    points = torch.from_numpy(np.asarray(groups, dtype=np.float64)).reshape(-1, n, size)
    apart = _apart(points, points)
    there = points.isfinite().all(-1)
    pairs = there[:, :, None] & there[:, None, :] & ~torch.eye(n, dtype=torch.bool)
    count = pairs.sum((1, 2))
    total = torch.where(pairs, apart, 0.0).sum((1, 2))
    return torch.where(count > 0, total / count / size**0.5, torch.nan).numpy().reshape(lead)


def distance_to_others(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean distance of each thumbnail to the others of its label, float64 [n]; NaN for a missing
    image, and where it has no other.

    points: [n, D], NaN where an image is missing. labels: int [n].
    """
    found, there = np.full(len(points), np.nan), np.isfinite(points).all(1)
    for label in np.unique(labels[there]):
        members = np.flatnonzero(there & (labels == label))
        if len(members) > 1:
            group = torch.from_numpy(np.asarray(points[members], dtype=np.float64))
            found[members] = (
                _apart(group, group).sum(1).numpy() / (len(members) - 1) / points.shape[1] ** 0.5
            )
    return found


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact distances float64 [n, m] of points of whole numbers, [n, D] and [m, D], such as
    thumbnails in levels.

    By a matrix product, which is several times faster than differences: sums of whole numbers below
    2^53 have no rounding.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.sqrt((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T))


def precision_and_recall(base: np.ndarray, now: np.ndarray, neighbors: int) -> tuple[float, float]:
    """How far two sets of points lie within each other: share of `now` in a ball of `base`, and
    share of `base` in a ball of `now`.

    Each point of a set has a ball that reaches to its k-th nearest neighbor in that set. A falling
    recall says that images which the base made are made no more; precision falls when new ones
    appear, better ones too.

    Args:
        base: whole numbers, [n, D].
        now: whole numbers, [m, D].
        neighbors: k, less than n and m.

    Source: arXiv 1904.06991, eq. 1 and 2; as monitors of a fine-tuned model arXiv 2305.18910.
    """
    between = distances(base, now)
    precision = (between <= _radii(base, neighbors)[:, None]).any(0)
    recall = (between <= _radii(now, neighbors)).any(1)
    return float(precision.mean()), float(recall.mean())


def _radii(points: np.ndarray, neighbors: int) -> np.ndarray:
    """Distance of each point to its k-th nearest other one, [n]."""
    apart = distances(points, points)
    np.fill_diagonal(apart, np.inf)
    return np.partition(apart, neighbors - 1, axis=1)[:, neighbors - 1]


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distances of real points; by way of a matrix product equal ones would not be at 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
