"""A reward of your own: a function of images, prompts and metadata that returns a number for each
image."""

import numpy as np


def warm(
    images: np.ndarray, prompts: list[str], metadata: list[dict], strength: float = 1.0
) -> np.ndarray:
    """How much more red than blue an image holds, in [-strength, strength]. images: uint8 [n,
    height, width, 3]."""
    pixels = images.astype(np.float32) / 255
    return strength * (pixels[..., 0] - pixels[..., 2]).mean(axis=(1, 2))
