"""The messages between `HttpReward` and the reward server: JSON, with images as PNG files in base64.

    POST /score   {"reward": "ocr", "images": ["iVBORw0..."], "prompts": ["..."], "metadata": [{...}]}
    200           {"scores": [0.75, null], "details": ["HELO", "not scored: ..."] or null}
    POST /score   {"reward": "motion", "frames": 16, "images": [...], ...}: videos of 16 frames each, one video after the other
    4xx, 5xx      {"error": "one line"}
    GET /rewards  {"rewards": {"ocr": {...counts}}}         GET /health  {"status": "ok"}

PNG is lossless, and a float32 survives the way through JSON's decimal numbers, so a reward's value is the same bits
wherever it is computed. An image that could not be scored is null, never a number.
A PNG of some kilobytes can hold gigapixels: sizes are read from the headers, and refused, before any pixel is unpacked.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import zlib

import numpy as np
from PIL import Image

from tempflow.errors import shown
from tempflow.media import frames_of, is_video
from tempflow.rewards.base import Scores

_LARGEST = float(np.finfo(np.float32).max)


def encode_png(image: np.ndarray) -> str:
    """uint8 RGB [H, W, 3] -> base64 of a PNG file."""
    buffer = io.BytesIO()
    # Of a noisy 1024 x 1024 photo: 77 ms of one EPYC core and 1.81 MB; level 1 without Z_RLE 103 ms, 2.05 MB; level 0 52 ms, 3.15 MB.
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return base64.b64encode(buffer.getbuffer()).decode("ascii")


def write_request(reward: str, media: np.ndarray, prompts: list[str], metadata: list[dict]) -> dict:
    """The message that asks for n scores of images or videos; an empty `reward` is left out and means the only one served."""
    message = {"images": [encode_png(frame) for item in media for frame in frames_of(item)], "prompts": prompts, "metadata": metadata}
    message |= {"frames": media.shape[1]} if is_video(media) else {}
    return {"reward": reward, **message} if reward else message


def open_images(encoded: list[str], max_pixels: int) -> list[Image.Image]:
    """PNG files in base64 -> images, not yet decoded.

    Raises ValueError naming the image that is no 8-bit RGB PNG or not of the first one's size, and for more than
    `max_pixels` in all.
    """
    images, pixels = [], 0
    for i, text in enumerate(encoded):
        try:
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        except Image.DecompressionBombError:
            raise ValueError(f"image {i} alone has more pixels than any image may have") from None
        except (binascii.Error, ValueError, OSError) as error:
            raise ValueError(f"image {i} is no PNG file in base64 ({type(error).__name__})") from None
        if image.mode != "RGB":
            raise ValueError(f"image {i} has mode {image.mode}, expected 8-bit RGB")
        if images and image.size != images[0].size:
            raise ValueError(f"image {i} is {_size(image)}, image 0 {_size(images[0])}; a request holds one size")
        pixels += image.width * image.height
        if pixels > max_pixels:
            raise ValueError(f"more than {max_pixels} pixels in one request; send fewer or smaller images")
        images.append(image)
    return images


def decode(images: list[Image.Image], frames: int | None = None) -> np.ndarray:
    """uint8 RGB [n, H, W, 3], or of n / frames videos [n / frames, frames, H, W, 3]; ValueError naming the image that is broken."""
    arrays = []
    for i, image in enumerate(images):
        try:
            arrays.append(np.asarray(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"image {i} is a broken PNG file: {error}") from None
    stacked = np.stack(arrays)
    return stacked if frames is None else stacked.reshape(-1, frames, *stacked.shape[1:])


def decoded_bytes(images: list[Image.Image]) -> int:
    return sum(3 * image.width * image.height for image in images)


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def write_answer(scores: Scores) -> dict:
    """The message that holds n scores."""
    values = [None if math.isnan(value) else value for value in scores.values.tolist()]
    return {"scores": values, "details": scores.details}


def read_answer(answer, n: int) -> Scores:
    """Scores of n images; ValueError unless the answer is n finite numbers or nulls and, if any, n texts."""
    if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
        raise ValueError(f'expected an object with a list "scores", got {shown(answer)}')
    values, details = answer["scores"], answer.get("details")
    if len(values) != n:
        raise ValueError(f"{len(values)} scores for {n} images")
    for i, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST):
            raise ValueError(f"score {i} is {shown(value)}, neither a finite number nor null")
    if details is not None and not (isinstance(details, list) and len(details) == n and all(isinstance(d, str) for d in details)):
        raise ValueError(f'"details" must be {n} texts or null')
    return Scores(np.array([math.nan if value is None else value for value in values], dtype=np.float32), details)
