"""Samples as data URIs, small enough that a report on 1024-pixel images or videos can be mailed."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

SIDE = 256  # largest height and width, pixels
QUALITY = 82  # of JPEG
FRAMES, VIDEO_QUALITY = 24, 60  # at most, of a moving thumbnail; 5 seconds of video are about 40 kB
KEEP_BYTES = 24_000  # a small PNG file of at most this size is embedded as it is
BUDGET = 10_000_000  # characters of all thumbnails of a page


@dataclass
class Thumbnail:
    """An image or a moving image as a data URI."""

    uri: str
    width: int
    """Pixels, so that the page keeps its layout while images are decoded."""
    height: int
    """Pixels."""
    still: str = ""
    """Data URI of a video's middle frame, for readers who have asked for reduced motion; "" for an
    image."""

    @property
    def size(self) -> int:
        """Characters in the page."""
        return len(self.uri) + len(self.still)


class Thumbnails:
    """Makes thumbnails until their total size reaches the budget."""

    def __init__(self, budget: int = BUDGET):
        self.left = budget
        self._made: dict[tuple[Path, bool], Thumbnail] = {}

    def get(self, path: Path, moving: bool = True) -> Thumbnail | None:
        """The thumbnail of a sample's file.

        Args:
            path: the file.
            moving: False: a still image, for videos too.

        Returns:
            None where the file is lost or damaged, or the budget does not hold it.
        """
        # The base's images appear twice, in a pair and over the course of training.
        if (path, moving) in self._made:
            return self._made[path, moving]
        try:
            thumbnail = _make(path, moving)
        except OSError:  # missing, or cut short by a crash
            return None
        if thumbnail.size > self.left:
            return None
        self.left -= thumbnail.size
        self._made[path, moving] = thumbnail
        return thumbnail


def _make(path: Path, moving: bool) -> Thumbnail:
    from PIL import Image

    raw = path.read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
        image.load()
        if getattr(image, "n_frames", 1) > 1:
            return _of_video(raw, moving)
        if max(image.size) <= SIDE and len(raw) <= KEEP_BYTES and image.format == "PNG":
            return Thumbnail(_uri(raw, "png"), *image.size)
        return _of_image(image.convert("RGB"))


def _of_image(image) -> Thumbnail:
    from PIL import Image

    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=QUALITY, optimize=True)
    return Thumbnail(_uri(encoded.getvalue(), "jpeg"), *image.size)


def _of_video(raw: bytes, moving: bool) -> Thumbnail:
    """A moving thumbnail that lasts as long as the video, with at most FRAMES frames."""
    from PIL import Image

    from tempflow.media import frame_places
    from tempflow.run.files import FRAME_MS, frames_of_file, save_webp

    frames = frames_of_file(io.BytesIO(raw))
    still = _of_image(frames[len(frames) // 2].copy())
    if not moving:
        return still
    chosen = [frames[place].copy() for place in frame_places(len(frames), FRAMES)]
    for frame in chosen:
        frame.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    save_webp(chosen, encoded, round(FRAME_MS * len(frames) / len(chosen)), VIDEO_QUALITY)
    width, height = chosen[0].size
    return Thumbnail(_uri(encoded.getvalue(), "webp"), width, height, still.uri)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
