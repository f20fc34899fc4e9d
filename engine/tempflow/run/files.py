"""Images and videos as files for people: PNG, and animated WebP that plays in a loop.

PNG is lossless and WebP is not, so rewards and metrics are computed from the arrays, never from the
files. WebP was chosen because browsers, image viewers and Pillow show it without another codec.
Where only still images can be shown, a video is shown as a row of some of its frames.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tempflow.media import frame_places

SUFFIXES = (".png", ".webp")
CONDITION = "_condition"  # ends the stem of the file with a prompt's condition images
FRAME_MS = 62  # 16 frames a second, as Wan makes; WebP stores whole milliseconds
QUALITY, EFFORT = 80, 2  # of 100 and of 6; effort 4 takes twice the time for the same size


@dataclass(frozen=True)
class MediaFile:
    """An encoded file: its suffix with the dot, its bytes, and its image's height in pixels."""

    suffix: str
    content: bytes
    height: int

    def write(self, folder: Path, stem: str) -> str:
        """Write the file into a folder; returns its name."""
        name = stem + self.suffix
        (folder / name).write_bytes(self.content)
        return name


def encoded(item: np.ndarray) -> MediaFile:
    """Encode one image, uint8 [H, W, 3], or video, uint8 [F, H, W, 3]."""
    buffer = io.BytesIO()
    if item.ndim == 3:
        Image.fromarray(item).save(buffer, "PNG")
        return MediaFile(".png", buffer.getvalue(), item.shape[-3])
    save_webp([Image.fromarray(frame) for frame in item], buffer, FRAME_MS, QUALITY)
    return MediaFile(".webp", buffer.getvalue(), item.shape[-3])


def save_webp(frames: list[Image.Image], buffer: io.BytesIO, frame_ms: int, quality: int) -> None:
    """Write frames as an animated WebP. quality: of 100.

    Pillow stores equal consecutive frames as one frame that is shown longer; `frames_of_file`
    repeats it again.
    """
    more = {"save_all": True, "append_images": frames[1:], "duration": frame_ms, "loop": 0}
    frames[0].save(buffer, "WEBP", quality=quality, method=EFFORT, **more)


def frames_of_file(file: Path | io.BytesIO) -> list[Image.Image]:
    """The frames of a file that `encoded` made, in RGB, as many as the video had; one for an image.

    Raises:
        OSError: where the file is damaged.
    """
    frames = []
    with Image.open(file) as opened:
        for place in range(getattr(opened, "n_frames", 1)):
            opened.seek(place)
            opened.load()  # Pillow sets the duration of a frame only when it is decoded
            shown = round((opened.info.get("duration") or FRAME_MS) / FRAME_MS)
            frames += [opened.convert("RGB")] * max(1, shown)
    return frames


def strip_of_file(file: Path, side: int, most: int) -> tuple[Image.Image, int]:
    """A still image of a file: at most `most` of its frames in a row, each at most `side` pixels a
    side, and the number of these frames."""
    frames = frames_of_file(file)
    chosen = [frames[place].copy() for place in frame_places(len(frames), most)]
    for frame in chosen:
        frame.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Image.fromarray(np.concatenate([np.asarray(frame) for frame in chosen], axis=1)), len(
        chosen
    )
