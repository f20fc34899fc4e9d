"""A reward of your own for editing: how much of the layout of its condition image an edit has
kept."""

import numpy as np
from PIL import Image

from tempflow.rewards import Reward, Scores, check_conditions, condition_images


class Kept(Reward):
    """1 minus the root mean square difference of an image and its prompt's first condition image,
    both in gray levels from 0 to 1.

    side: pixels a side that both are scaled to; fewer see less of the details.
    """

    def __init__(self, side: int = 32):
        self._side = side

    def check_prompts(self, prompts: list[str], metadata: list[dict]) -> None:
        check_conditions(prompts, metadata)  # a prompt without an image is refused at the start

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        befores = [self._small(condition_images(entry)[0]) for entry in metadata]
        apart = [
            np.sqrt(np.square(self._small(after) - before).mean())
            for after, before in zip(images, befores, strict=True)
        ]
        return Scores(1 - np.array(apart))

    def _small(self, image: np.ndarray) -> np.ndarray:
        """Gray levels [side, side] of an image [H, W, 3] of any size."""
        gray = Image.fromarray(image).convert("L")
        return (
            np.asarray(
                gray.resize((self._side, self._side), Image.Resampling.BOX), dtype=np.float32
            )
            / 255
        )
