"""What each place of an image is worth, on the grid of the latents, for advantages by place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from tempflow.rewards import RewardSpec
from tempflow.rewards.base import Scores
from tempflow.training import distributed
from tempflow.training.session import Session
from tempflow.types import Size

if TYPE_CHECKING:  # rollout imports this module
    from tempflow.training.rollout import RolledOut


def maps(session: Session, rolled: RolledOut, scores: list[dict[str, Scores]]) -> np.ndarray | None:
    """The weighted sum of the rewards of every slot at each place of its latent, float64 [n, rows,
    columns], NaN where a reward failed; None unless the advantage needs it (a collective then).

    Args:
        session: the run.
        rolled: the rollout.
        scores: of its tickets.
    """
    if not session.advantage.needs_maps:
        return None
    grid = latent_grid(session.sampler.latent_shape, session.sampler.size)
    seen = np.concatenate([summed(score, session.trained, grid) for score in scores])
    # Rows of other ranks are 0, so that the sum over ranks puts every row in its place.
    whole = np.zeros((len(rolled.layout), math.prod(grid)))
    whole[[rolled.forest.numbers[n] for n in rolled.images.rows]] = seen.reshape(len(seen), -1)
    found = rolled.layout.slots.means(distributed.reduce(whole).T).T
    return found.reshape(len(found), *grid)


def latent_grid(shape: tuple[int, ...], size: Size) -> tuple[int, int]:
    """Rows and columns of the places of a latent, those of an image's packed tokens included.

    Args:
        shape: of a latent: [tokens, C], or [C, ..., rows, columns].
        size: of its image.
    """
    if len(shape) > 2:
        return shape[-2], shape[-1]
    # Tokens are of square patches.
    rows = round(math.sqrt(shape[0] * size.height / size.width))
    return rows, shape[0] // rows


def summed(scores: dict[str, Scores], specs: list[RewardSpec], grid: tuple[int, int]) -> np.ndarray:
    """The weighted sum of the rewards that apply at each place, float64 [images, rows, columns];
    NaN for images that a reward failed to score."""
    total = np.zeros(grid)
    for spec in specs:
        score = scores[spec.name]
        values = score.values.astype(np.float64)[:, None, None]
        if score.maps is None:
            each = np.broadcast_to(values, (len(values), *grid))
        else:
            # Means over the cells of the grid; a coarser map is repeated.
            there = adaptive_avg_pool2d(torch.from_numpy(score.maps), grid).numpy()
            each = np.where(np.isfinite(values), there, np.nan)
        total = total + np.where(score.applicable()[:, None, None], spec.weight * each, 0.0)
    return total
