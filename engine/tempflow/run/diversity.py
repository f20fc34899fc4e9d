"""How different images are: mean distances, which shrink when a policy collapses onto one image,
precision and recall of one set of images against another, and mean colors.

The distance of two images is the root mean square difference of their pixels in [0, 1], after both
were averaged down to at most 32 x 32 pixels. For two videos, a few frames of each are compared.
This distance sees layout and color but no fine texture, and its cost is negligible beside a
rollout. Distances of embeddings would see meaning as well, but need another model for every image.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from tempflow.media import frame_places
from tempflow.types import Size

SIDE = 32  # pixels of a thumbnail, at most
FRAMES = 4  # of a video, at most


def thumbnails(media: np.ndarray) -> np.ndarray:
    """Average images or videos down to at most SIDE pixels a side.

    Args:
        media: uint8 [n, H, W, 3], or [n, F, H, W, 3].

    Returns:
        float32 [n, D] in [0, 1].
    """
    return thumbnails_there(torch.from_numpy(media)).numpy()


def thumbnails_there(media: torch.Tensor) -> torch.Tensor:
    """`thumbnails` of uint8 [n, H, W, 3] or [n, F, H, W, 3], on their device."""
    if media.ndim == 5:
        # Frame by frame: an index list would be copied to the GPU, and the host would wait for it.
        places = frame_places(media.shape[1], FRAMES).tolist()
        frames = torch.stack([media[:, place] for place in places], 1)
    else:
        frames = media[:, None]
    pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    sides = min(SIDE, pixels.shape[2]), min(SIDE, pixels.shape[3])
    return F.adaptive_avg_pool2d(pixels, sides).reshape(len(media), -1)


def mean_colors(thumbnails: np.ndarray, size: Size) -> np.ndarray:
    """Mean colors, float64 [n, 3] in [0, 1], of the images or videos of `size` that thumbnails
    [n, D] are of."""
    pixels = min(SIDE, size.height) * min(SIDE, size.width)
    return thumbnails.reshape(len(thumbnails), -1, 3, pixels).mean((1, 3), dtype=np.float64)


def mean_distance(groups: np.ndarray) -> np.ndarray:
    """Mean distance over all pairs within each group of thumbnails.

    Args:
        groups: [..., n, D] with n >= 2; NaN in the thumbnails of missing images, which are in no
            pair.

    Returns:
        float64 [...]; NaN where a group has no pair.
    """
    *lead, n, size = groups.shape
    points = torch.from_numpy(np.asarray(groups, dtype=np.float64)).reshape(-1, n, size)
    apart = _apart(points, points)
    there = points.isfinite().all(-1)
    pairs = there[:, :, None] & there[:, None, :] & ~torch.eye(n, dtype=torch.bool)
    count = pairs.sum((1, 2))
    # where, not a product: 0 times the NaN of a missing image is NaN.
    total = torch.where(pairs, apart, 0.0).sum((1, 2))
    return torch.where(count > 0, total / count / size**0.5, torch.nan).numpy().reshape(lead)


def distance_to_others(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean distance of each thumbnail to the others of its label.

    Args:
        points: [n, D], NaN where an image is missing.
        labels: int [n].

    Returns:
        float64 [n]; NaN for a missing image, and for one that is alone with its label.
    """
    found, there = np.full(len(points), np.nan), np.isfinite(points).all(1)
    for label in np.unique(labels[there]):
        members = np.flatnonzero(there & (labels == label))
        if len(members) > 1:
            group = torch.from_numpy(np.asarray(points[members], dtype=np.float64))
            # n - 1: the distance of an image to itself is in the sum, as 0, but not in the mean.
            found[members] = (
                _apart(group, group).sum(1).numpy() / (len(members) - 1) / points.shape[1] ** 0.5
            )
    return found


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact Euclidean distances of points whose coordinates are whole numbers, such as thumbnails
    in gray levels.

    Args:
        a: [n, D].
        b: [m, D].

    Returns:
        float64 [n, m].
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    # By a matrix product: 0.25 s of CPU time for 512 images, where differences took 3.9 s. For real
    # numbers it cancels badly, but here all sums are whole numbers below 2^53, exact in float64.
    return np.sqrt((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T))


def precision_and_recall(base: np.ndarray, now: np.ndarray, neighbors: int) -> tuple[float, float]:
    """Precision, the share of `now` within the balls of `base`, and recall, the share of `base`
    within the balls of `now`.

    The ball around a point reaches to its k-th nearest neighbor in its own set. Recall falls when
    images like some of the base's are no longer made. Precision falls when new kinds of images
    appear, better ones included. Source: arXiv 1904.06991, eq. 1 and 2; as monitors of a fine-tuned
    model arXiv 2305.18910.

    Args:
        base: whole numbers, [n, D].
        now: whole numbers, [m, D].
        neighbors: k, less than n and m.
    """
    between = distances(base, now)
    precision = (between <= _radii(base, neighbors)[:, None]).any(0)
    recall = (between <= _radii(now, neighbors)).any(1)
    return float(precision.mean()), float(recall.mean())


def _radii(points: np.ndarray, neighbors: int) -> np.ndarray:
    """Distance of each point to its k-th nearest other one, [n]."""
    apart = distances(points, points)
    np.fill_diagonal(apart, np.inf)  # a point is not its own neighbor
    return np.partition(apart, neighbors - 1, axis=1)[:, neighbors - 1]


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distances of points with real coordinates."""
    # cdist's matrix product would round the distance of equal points to more than 0.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
