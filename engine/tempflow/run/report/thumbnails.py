"""Sample images as data URIs, small enough that a report of 1024-pixel images can be mailed."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

SIDE = 256
QUALITY = 82
KEEP_BYTES = 24_000
BUDGET = 10_000_000


@dataclass
class Thumbnail:
    uri: str
    width: int
    height: int


class Thumbnails:
    """Makes thumbnails until their total size reaches the budget; after that, and for a lost image, None."""

    def __init__(self, budget: int = BUDGET):
        self.left = budget
        self._made: dict[Path, Thumbnail] = {}

    def get(self, path: Path) -> Thumbnail | None:
        if path in self._made:
            return self._made[path]
        try:
            thumbnail = _make(path)
        except OSError:  # missing, or cut short by a crash
            return None
        if len(thumbnail.uri) > self.left:
            return None
        self.left -= len(thumbnail.uri)
        self._made[path] = thumbnail
        return thumbnail


def _make(path: Path) -> Thumbnail:
    from PIL import Image

    raw = path.read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
        image.load()
        if max(image.size) <= SIDE and len(raw) <= KEEP_BYTES and image.format == "PNG":
            return Thumbnail(_uri(raw, "png"), *image.size)
        image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=QUALITY, optimize=True)
        return Thumbnail(_uri(encoded.getvalue(), "jpeg"), *image.size)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
