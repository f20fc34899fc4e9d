"""Images and videos as arrays.

Images are uint8 [n, H, W, 3], videos uint8 [n, F, H, W, 3]. Outside the model families only this
module tells the two apart. As one image, a video is shown as a contact strip: frames side by side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tempflow.errors import RankError, brief, shown
from tempflow.types import Size

# The checkerboard for a missing image: pixels per side of a tile, and its color. Magenta is not
# mistaken for a sample, as black or gray would be.
TILE, NO_IMAGE = (8, (255, 0, 255))
STRIP = 8  # most frames of a contact strip


def condition_image(image: str | Path | np.ndarray) -> Image.Image:
    """Open a condition image in RGB.

    Args:
        image: one of `Example.images`: a file, which is rotated by its EXIF data and loses its
            transparency, or a uint8 array [H, W, 3].

    Raises:
        RankError: the file cannot be read as an image.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    # PIL raises each of these for damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # RankError, because other ranks read other files.
        raise RankError(
            f"image {shown(str(image), 300)}: cannot be read as an image: {brief(error)}"
        ) from None


def is_video(media: np.ndarray) -> bool:
    """Whether an array contains videos [n, F, H, W, 3], not images."""
    return media.ndim == 5


def check_media(media: np.ndarray) -> None:
    """Raise ValueError for an array that contains neither images nor videos."""
    if media.dtype != np.uint8 or media.ndim not in (4, 5) or media.shape[-1] != 3:
        raise ValueError(
            f"images must be uint8 [n, H, W, 3], videos uint8 [n, F, H, W, 3]; got {media.dtype}"
            f" {list(media.shape)}"
        )


def plain(count: int, size: Size, level: int) -> np.ndarray:
    """`count` images or videos of one gray level, 0 to 255."""
    # A video has an axis of frames, and a video of one frame is an image.
    frames = (size.frames,) if size.frames > 1 else ()
    return np.full((count, *frames, size.height, size.width, 3), level, dtype=np.uint8)


def frames_of(item: np.ndarray) -> np.ndarray:
    """The frames [F, H, W, 3] of one video; of one image, with F = 1."""
    return item if item.ndim == 4 else item[None]


def frame_places(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` frames, evenly spaced from the first to the last."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def some_frames(media: np.ndarray, most: int) -> np.ndarray:
    """At most `most` frames of each video, [n, f, H, W, 3], chosen by `frame_places`; an image has
    one frame."""
    return media[:, frame_places(media.shape[1], most)] if is_video(media) else media[:, None]


def still(item: np.ndarray) -> np.ndarray:
    """One image or video as an image, uint8 [H, W, 3]; a video as a contact strip."""
    return (
        item if item.ndim == 3 else np.concatenate(list(some_frames(item[None], STRIP)[0]), axis=1)
    )


def no_image(height: int, width: int) -> np.ndarray:
    """A magenta and black checkerboard, uint8 [height, width, 3], in place of an image or frame
    with NaN or infinity."""
    rows, columns = np.ogrid[:height, :width]
    return np.where(((rows // TILE + columns // TILE) % 2 == 0)[..., None], NO_IMAGE, 0).astype(
        np.uint8
    )


def without_missing(media: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Replace images or videos that are not finite by checkerboards, in place.

    Args:
        media: images or videos.
        finite: bool [n].

    Returns:
        `media`.
    """
    media[~finite] = no_image(*media.shape[-3:-1])
    return media
