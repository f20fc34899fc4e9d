"""Images and videos as arrays; the one module outside the model families that tells the two apart.

Images are uint8 [n, H, W, 3], videos uint8 [n, F, H, W, 3]. People see a video as a contact strip:
frames side by side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tempflow.errors import RankError, brief, shown
from tempflow.types import Size

# pixels a side and color of the tiles that stand for a missing image
TILE, NO_IMAGE = (8, (255, 0, 255))
STRIP = 8  # frames of a contact strip


def condition_image(image: str | Path | np.ndarray) -> Image.Image:
    """One of `Example.images` in RGB: the file turned as its EXIF data says, without transparency,
    or the array as it is.

    RankError for a file that cannot be read as an image.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # PIL raises each of them for damaged files
        raise RankError(
            f"image {shown(str(image), 300)}: cannot be read as an image: {brief(error)}"
        ) from None


def is_video(media: np.ndarray) -> bool:
    """Whether an array holds videos, [n, F, H, W, 3], and not images."""
    return media.ndim == 5


def check_media(media: np.ndarray) -> None:
    """ValueError for an array that holds neither images nor videos."""
    if media.dtype != np.uint8 or media.ndim not in (4, 5) or media.shape[-1] != 3:
        raise ValueError(
            f"images must be uint8 [n, H, W, 3], videos uint8 [n, F, H, W, 3]; got {media.dtype}"
            f" {list(media.shape)}"
        )


def plain(count: int, size: Size, level: int) -> np.ndarray:
    """Images or videos of one gray level, 0 to 255."""
    frames = (size.frames,) if size.frames > 1 else ()
    return np.full((count, *frames, size.height, size.width, 3), level, dtype=np.uint8)


def frames_of(item: np.ndarray) -> np.ndarray:
    """The frames [F, H, W, 3] of one video, or of an image, which is one."""
    return item if item.ndim == 4 else item[None]


def frame_places(count: int, most: int) -> np.ndarray:
    """Places of at most `most` of `count` frames, evenly spaced from the first to the last; of one
    alone the first."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def some_frames(media: np.ndarray, most: int) -> np.ndarray:
    """At most `most` frames of each video, as `frame_places` chooses them, [n, f, H, W, 3]; an
    image is one frame."""
    return media[:, frame_places(media.shape[1], most)] if is_video(media) else media[:, None]


def still(item: np.ndarray) -> np.ndarray:
    """What people are shown of one image or video, uint8 [H, W, 3]: the image, or a contact strip
    of the video."""
    return (
        item if item.ndim == 3 else np.concatenate(list(some_frames(item[None], STRIP)[0]), axis=1)
    )


def no_image(height: int, width: int) -> np.ndarray:
    """What stands for an image or frame that could not be made, uint8 [height, width, 3]: a magenta
    and black checkerboard."""
    rows, columns = np.ogrid[:height, :width]
    return np.where(((rows // TILE + columns // TILE) % 2 == 0)[..., None], NO_IMAGE, 0).astype(
        np.uint8
    )


def without_missing(media: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """The same images or videos, in place, with `no_image` in every frame of those that are not
    finite, bool [n]."""
    media[~finite] = no_image(*media.shape[-3:-1])
    return media
