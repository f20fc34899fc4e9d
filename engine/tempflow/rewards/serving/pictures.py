"""Pictures of a request: their sizes are read, and refused, before any pixel is unpacked.

A PNG of some kilobytes can hold gigapixels; what a picture will need is in its header.
"""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from PIL import Image


def open_pictures(encoded: list[str], max_pixels: int) -> list[Image.Image]:
    """PNG files in base64 -> pictures, not yet decoded.

    Raises ValueError naming the picture that is no 8-bit RGB PNG or not of the first one's size, and for more than
    `max_pixels` in all.
    """
    pictures, pixels = [], 0
    for i, text in enumerate(encoded):
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        except Image.DecompressionBombError:
            raise ValueError(f"image {i} alone has more pixels than any picture may have") from None
        except (binascii.Error, ValueError, OSError) as error:
            raise ValueError(f"image {i} is no PNG file in base64 ({type(error).__name__})") from None
        if picture.mode != "RGB":
            raise ValueError(f"image {i} has mode {picture.mode}, expected 8-bit RGB")
        if pictures and picture.size != pictures[0].size:
            raise ValueError(f"image {i} is {_size(picture)}, image 0 {_size(pictures[0])}; a request holds one size")
        pixels += picture.width * picture.height
        if pixels > max_pixels:
            raise ValueError(f"more than {max_pixels} pixels in one request; send fewer or smaller pictures")
        pictures.append(picture)
    return pictures


def decode(pictures: list[Image.Image]) -> np.ndarray:
    """uint8 RGB [n, H, W, 3]; ValueError naming the picture that is broken."""
    arrays = []
    for i, picture in enumerate(pictures):
        try:
            arrays.append(np.asarray(picture))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"image {i} is a broken PNG file: {error}") from None
    return np.stack(arrays)


def decoded_bytes(pictures: list[Image.Image]) -> int:
    return sum(3 * picture.width * picture.height for picture in pictures)


def _size(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}"
