"""Images joined for people to look at: rows and columns with white between the images, the
condition images of a prompt before the images made from them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tempflow.media import condition_image
from tempflow.types import Example

GAP = 4  # white columns between the images of a row


def row(items: list[np.ndarray]) -> np.ndarray:
    """Join images [H, W, 3] or videos [F, H, W, 3] of one height from left to right, uint8; beside
    videos, an image is repeated in every frame."""
    frames = next((item.shape[:1] for item in items if item.ndim == 4), ())
    gap = np.full((*frames, items[0].shape[-3], GAP, 3), 255, np.uint8)
    # A view: a still image beside a video is not copied for each frame.
    whole = [np.broadcast_to(item, (*frames, *item.shape[-3:])) for item in items]
    parts = [part for item in whole for part in (item, gap)]
    return np.concatenate(parts[:-1], axis=-2)  # without the gap after the last image


def column(images: list[np.ndarray]) -> np.ndarray:
    """Join images [H, W, 3] from top to bottom, uint8; narrower ones are padded with white on the
    right."""
    width = max(image.shape[1] for image in images)
    return np.concatenate(
        [
            np.pad(image, ((0, 0), (0, width - image.shape[1]), (0, 0)), constant_values=255)
            for image in images
        ]
    )


def conditions(prompt: Example, height: int) -> list[np.ndarray]:
    """A prompt's condition images, each scaled to `height`, uint8 [height, W, 3].

    Raises:
        UserError: for a file that cannot be read.
    """
    return [_of_height(condition_image(image), height) for image in prompt.images]


def _of_height(image: Image.Image, height: int) -> np.ndarray:
    # max: a very narrow image would be scaled to no columns at all.
    width = max(1, round(image.width * height / image.height))
    return np.asarray(
        image if image.height == height else image.resize((width, height), Image.Resampling.LANCZOS)
    )
