"""The condition images of a prompt as rewards get them: `metadata["images"]`, a list of paths or of
uint8 arrays [H, W, 3].

Prompts without images lack the key. The list holds paths where a prompt file names the images, and
arrays where they came as arrays: from a dataset's column, or through a reward server.
`condition_images` reads both.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from tempflow.errors import UserError
from tempflow.media import condition_image
from tempflow.rewards.base import locate

KEY = "images"
KEPT = 8  # decoded files; the images of a batch are most often of a few prompts


def condition_images(metadata: dict) -> list[np.ndarray]:
    """A prompt's condition images, read-only uint8 RGB [H, W, 3] of any sizes, upright; [] without
    any. UserError for a file that cannot be read."""
    return [
        image if isinstance(image, np.ndarray) else _read(image) for image in metadata.get(KEY, ())
    ]


def check_conditions(prompts: list[str], metadata: list[dict]) -> None:
    """UserError for the first prompt without a condition image, for the `check_prompts` of rewards
    that need one."""
    for prompt, entry in zip(prompts, metadata, strict=True):
        if not entry.get(KEY):
            raise UserError(
                f"{locate(prompt, entry)} brings no condition image, which this reward needs; name"
                ' it as "image"'
            )


def scaled(image: np.ndarray, longest: int) -> np.ndarray:
    """An image [H, W, 3] whose longer side is at most `longest` pixels."""
    if max(image.shape[:2]) <= longest:
        return image
    small = Image.fromarray(image)
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(small)


@lru_cache(maxsize=KEPT)
def _read(file: str) -> np.ndarray:
    pixels = np.array(condition_image(file))
    pixels.flags.writeable = False  # it is handed out again
    return pixels
