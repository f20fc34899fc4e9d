"""Samples as data URIs, small enough that a report of 1024-pixel images, or of videos, can be
mailed."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

SIDE = 256
QUALITY = 82
FRAMES, VIDEO_QUALITY = 24, 60  # of a moving thumbnail at most; 5 seconds of video are about 40 kB
KEEP_BYTES = 24_000
BUDGET = 10_000_000


@dataclass
class Thumbnail:
    """still: of a video the frame in its middle, for who has asked for reduced motion; "" of an
    image."""

    uri: str
    width: int
    height: int
    still: str = ""

    @property
    def size(self) -> int:
        """Characters of the page."""
        return len(self.uri) + len(self.still)


class Thumbnails:
    """Makes thumbnails until their total size reaches the budget; after that, and for a lost image,
    None."""

    def __init__(self, budget: int = BUDGET):
        self.left = budget
        self._made: dict[tuple[Path, bool], Thumbnail] = {}

    def get(self, path: Path, moving: bool = True) -> Thumbnail | None:
        """Of a file of samples. moving=False: of a video the still alone."""
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
    """As long as the video, of fewer frames where it has many."""
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
