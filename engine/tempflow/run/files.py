"""Images and videos as files for people: PNG, or an animated WebP that plays over and over.

Unlike an image, a video is lossy in its file; rewards and metrics see the arrays. WebP because
browsers, image viewers and Pillow itself show it without a codec to install. Where nothing can
move, some frames of a video in a row stand for it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tempflow.media import frame_places

SUFFIXES = (".png", ".webp")
CONDITION = "_condition"  # ends the name of what a prompt brings, before the suffix
FRAME_MS = 62  # 16 frames a second, as Wan's; of whole milliseconds, as the format has them
QUALITY, EFFORT = 80, 2  # of WebP's 100 and 6; effort 4 takes twice the time for the same size


@dataclass(frozen=True)
class MediaFile:
    """A file's ending, its bytes, and how many pixels high it is."""

    suffix: str
    content: bytes
    height: int

    def write(self, folder: Path, stem: str) -> str:
        """Write it into a folder; returns its name."""
        name = stem + self.suffix
        (folder / name).write_bytes(self.content)
        return name


def encoded(item: np.ndarray) -> MediaFile:
    """The file of one image, uint8 [H, W, 3], or video [F, H, W, 3]."""
    buffer = io.BytesIO()
    if item.ndim == 3:
        Image.fromarray(item).save(buffer, "PNG")
        return MediaFile(".png", buffer.getvalue(), item.shape[-3])
    save_webp([Image.fromarray(frame) for frame in item], buffer, FRAME_MS, QUALITY)
    return MediaFile(".webp", buffer.getvalue(), item.shape[-3])


def save_webp(frames: list[Image.Image], buffer: io.BytesIO, frame_ms: int, quality: int) -> None:
    """Write frames as an animated WebP; equal frames in a row become one that is shown longer."""
    more = {"save_all": True, "append_images": frames[1:], "duration": frame_ms, "loop": 0}
    frames[0].save(buffer, "WEBP", quality=quality, method=EFFORT, **more)


def frames_of_file(file: Path | io.BytesIO) -> list[Image.Image]:
    """The frames of a file that `encoded` made, in RGB, as many as were shown; of an image one.
    OSError where it is damaged."""
    frames = []
    with Image.open(file) as opened:
        for place in range(getattr(opened, "n_frames", 1)):
            opened.seek(place)
            opened.load()
            shown = round((opened.info.get("duration") or FRAME_MS) / FRAME_MS)
            frames += [opened.convert("RGB")] * max(1, shown)
    return frames


def strip_of_file(file: Path, side: int, most: int) -> tuple[Image.Image, int]:
    """What stands for a file where nothing moves: at most `most` of its frames in a row, each at
    most `side` pixels a side, and their number."""
    frames = frames_of_file(file)
    chosen = [frames[place].copy() for place in frame_places(len(frames), most)]
    for frame in chosen:
        frame.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Image.fromarray(np.concatenate([np.asarray(frame) for frame in chosen], axis=1)), len(
        chosen
    )
