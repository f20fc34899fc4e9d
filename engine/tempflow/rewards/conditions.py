"""The condition images of a prompt, as rewards get them: under "images" in the prompt's metadata.

The value is a list of paths if a prompt file names the images, and of uint8 arrays [H, W, 3] if
they came from a dataset or through a reward server; `condition_images` reads both. The metadata of
a prompt without images lacks the key.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from tempflow.errors import UserError
from tempflow.media import condition_image
from tempflow.rewards.base import locate

KEY = "images"
KEPT = 8  # decoded files; the images of a batch usually share a few prompts


def condition_images(metadata: dict) -> list[np.ndarray]:
    """A prompt's condition images.

    Args:
        metadata: what `Reward.score` gets for the prompt.

    Returns:
        Read-only uint8 RGB [H, W, 3] each, upright, of any sizes; [] for a prompt without images.

    Raises:
        UserError: for a file that cannot be read.
    """
    return [
        image if isinstance(image, np.ndarray) else _read(image) for image in metadata.get(KEY, ())
    ]


def check_conditions(prompts: list[str], metadata: list[dict]) -> None:
    """Raise UserError for the first prompt without a condition image. Rewards that need one call
    this in their `check_prompts`."""
    for prompt, entry in zip(prompts, metadata, strict=True):
        if not entry.get(KEY):
            raise UserError(
                f"{locate(prompt, entry)} has no condition image, which this reward needs; name a"
                ' file under "image" in the prompt\'s line'
            )


def scaled(image: np.ndarray, longest: int) -> np.ndarray:
    """An image [H, W, 3] scaled down, if need be, to a longer side of `longest` pixels."""
    if max(image.shape[:2]) <= longest:
        return image
    small = Image.fromarray(image)
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(small)


@lru_cache(maxsize=KEPT)
def _read(file: str) -> np.ndarray:
    pixels = np.array(condition_image(file))
    pixels.flags.writeable = False  # a reward that wrote into it would change the cached image
    return pixels
