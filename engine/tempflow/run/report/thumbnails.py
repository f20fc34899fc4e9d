"""Sample pictures as data URIs, small enough that a report of 1024-pixel pictures can be mailed."""

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
    """Makes thumbnails until their total size reaches the budget; after that, and for a lost picture, None."""

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
    with Image.open(io.BytesIO(raw)) as picture:
        picture.load()
        if max(picture.size) <= SIDE and len(raw) <= KEEP_BYTES and picture.format == "PNG":
            return Thumbnail(_uri(raw, "png"), *picture.size)
        picture = picture.convert("RGB")
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=QUALITY, optimize=True)
        return Thumbnail(_uri(encoded.getvalue(), "jpeg"), *picture.size)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
