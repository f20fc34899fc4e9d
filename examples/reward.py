"""Two rewards of your own: a function of the images, and a class with options and checks.

The function scores how warm an image is. The class scores an edit by how much of its condition
image it keeps. A config names them "reward:warm" and "reward:Kept".
"""

import numpy as np
from PIL import Image

from tempflow.rewards import Reward, Scores, check_conditions, condition_images


def warm(
    images: np.ndarray, prompts: list[str], metadata: list[dict], strength: float = 1.0
) -> np.ndarray:
    """How much more red than blue an image holds, in [-strength, strength].

    Args:
        images: uint8 [n, height, width, 3].
        prompts: n texts.
        metadata: n tables with the other fields of each prompt's line in the prompt file.
        strength: factor of the result, from the config.
    """
    pixels = images.astype(np.float32) / 255
    return strength * (pixels[..., 0] - pixels[..., 2]).mean(axis=(1, 2))


class Kept(Reward):
    """1 minus the root mean square difference between an image and its prompt's first condition
    image, in gray levels from 0 to 1.

    Args:
        side: both are scaled to this many pixels a side; a smaller side ignores finer details.
    """

    def __init__(self, side: int = 32):
        self._side = side

    def check_prompts(self, prompts: list[str], metadata: list[dict]) -> None:
        check_conditions(prompts, metadata)  # a prompt without an image ends the run at its start

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        originals = [self._small(condition_images(entry)[0]) for entry in metadata]
        apart = [
            np.sqrt(np.square(self._small(after) - original).mean())
            for after, original in zip(images, originals, strict=True)
        ]
        return Scores(1 - np.array(apart))

    def _small(self, image: np.ndarray) -> np.ndarray:
        """Gray levels [side, side] of an image [H, W, 3] of any size."""
        size = (self._side, self._side)
        gray = Image.fromarray(image).convert("L").resize(size, Image.Resampling.BOX)
        return np.asarray(gray, dtype=np.float32) / 255
