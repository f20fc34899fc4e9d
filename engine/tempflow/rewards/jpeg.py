"""JPEG reward: prefers images that compress well, or badly. It needs no model, so it is also useful
to try a setup."""

from __future__ import annotations

import io

import numpy as np

from tempflow.errors import UserError, shown
from tempflow.rewards.base import Reward, Scores


class JpegReward(Reward):
    """The size of the image as a JPEG file, in kB (1000 bytes), or its negative.

    Args:
        goal: "small" for images that compress well (the score is minus the size), "large" for
            images that do not (the score is the size).
        quality: the encoder's quality setting, 1 to 95.
    """

    def __init__(self, goal: str = "small", quality: int = 95):
        if goal not in ("small", "large"):
            raise UserError(f'goal: expected "small" or "large", got {shown(goal)}')
        if not 1 <= quality <= 95:
            raise UserError(f"quality: expected 1 to 95, got {shown(quality)}")
        self._sign = -1.0 if goal == "small" else 1.0
        self._quality = quality

    def score(self, images, prompts, metadata):
        sizes = np.array([self._kilobytes(image) for image in images], dtype=np.float32)
        return Scores(self._sign * sizes, [f"{size:.1f} kB" for size in sizes])

    def _kilobytes(self, image: np.ndarray) -> float:
        from PIL import Image  # here, because the training process builds this reward too

        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self._quality)
        return buffer.tell() / 1000
