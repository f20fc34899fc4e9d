"""The messages between `HttpReward` and the reward server: JSON, in which images are PNG files in
base64.

    POST /score   {"reward": "ocr", "images": ["iVBORw0..."], "prompts": ["..."], "metadata":
        [{...}]}
    200           {"scores": [0.75, null], "details": ["HELO", "not scored: ..."] or null}
    POST /score   {"reward": "motion", "frames": 16, "images": [...], ...}: videos of 16 frames
        each, one video after the other
    4xx, 5xx      {"error": "one line"}
    GET /rewards  {"rewards": {"ocr": {...counts}}}         GET /health  {"status": "ok"}

PNG is lossless, and JSON's decimal numbers reproduce a float32 exactly, so a reward's value has the
same bits wherever it is computed. An image that could not be scored is null, never a number.

Condition images are sent beside the metadata, each once: "conditions" holds them as PNG files of
any sizes, and "conditions_of" has the places of each prompt's images in that list, as in [[0], [0],
[1, 2]]. A request without condition images lacks both keys. On the server, the reward finds the
arrays in `metadata["images"]`. A request whose metadata has this key is refused, because the key
would name files of the server.

A PNG file of some kilobytes can hold gigapixels. Sizes are therefore read from the headers, and
checked, before any pixel is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image

from tempflow.errors import shown
from tempflow.media import frames_of, is_video
from tempflow.rewards.base import Scores
from tempflow.rewards.conditions import KEY, condition_images, scaled

_LARGEST = float(np.finfo(np.float32).max)  # larger scores would become infinite


def encode_png(image: np.ndarray) -> str:
    """uint8 RGB [H, W, 3] -> base64 of a PNG file."""
    buffer = io.BytesIO()
    # For a noisy 1024 x 1024 photo this takes 77 ms of one EPYC core and gives 1.81 MB; level 1
    # without Z_RLE takes 103 ms and gives 2.05 MB; level 0 takes 52 ms and gives 3.15 MB.
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return base64.b64encode(buffer.getbuffer()).decode("ascii")


@lru_cache(maxsize=16)  # a prompt's condition image is sent with each batch of its images
def _encoded_file(file: str, longest: int | None) -> str:
    (pixels,) = condition_images({KEY: [file]})
    return encode_png(pixels if longest is None else scaled(pixels, longest))


def encode_condition(image: str | np.ndarray, longest: int | None = None) -> str:
    """A condition image of a prompt's metadata -> base64 of a PNG file. longest: its longer side in
    pixels, to which larger images are scaled down; None: as it is."""
    if not isinstance(image, np.ndarray):
        return _encoded_file(image, longest)
    return encode_png(image if longest is None else scaled(image, longest))


def sendable(metadata: dict) -> dict:
    """Metadata without the condition images, which are sent as PNG files instead."""
    return {key: value for key, value in metadata.items() if key != KEY}


def write_request(reward: str, media: np.ndarray, prompts: list[str], metadata: list[dict]) -> dict:
    """The message that asks for scores.

    Args:
        reward: name of the reward on the server; "": the server's only one.
        media: uint8 RGB [n, H, W, 3], or videos [n, F, H, W, 3].
        prompts: n texts.
        metadata: n tables.
    """
    images = [encode_png(frame) for item in media for frame in frames_of(item)]
    message = {
        "images": images,
        "prompts": prompts,
        "metadata": [sendable(entry) for entry in metadata],
    }
    message |= {"frames": media.shape[1]} if is_video(media) else {}
    message |= _conditions([entry.get(KEY, []) for entry in metadata])
    return {"reward": reward, **message} if reward else message


def _conditions(given: list[list]) -> dict:
    """The part of a message with n prompts' condition images, each different one once; {} if there
    are none."""
    # Files are told apart by their paths, and arrays by identity: all images of one prompt come
    # with the same array objects, and comparing pixels would take time.
    keys = [
        [image if isinstance(image, str) else id(image) for image in images] for images in given
    ]
    different = {
        key: image
        for named, images in zip(keys, given, strict=True)
        for key, image in zip(named, images, strict=True)
    }
    if not different:
        return {}
    place = {key: n for n, key in enumerate(different)}
    return {
        "conditions": [encode_condition(image) for image in different.values()],
        "conditions_of": [[place[key] for key in named] for named in keys],
    }


def open_images(
    encoded: list[str], max_pixels: int, *, name: str = "image", alike: bool = True
) -> list[Image.Image]:
    """Open PNG files without decoding them.

    Args:
        encoded: PNG files in base64.
        max_pixels: most pixels of all images together.
        name: what an image is called in error messages.
        alike: whether all must have the size of the first one.

    Raises:
        ValueError: for a file that is not an 8-bit RGB PNG, for different sizes with `alike`, and
            for more than `max_pixels`; names the image.
    """
    images: list[Image.Image] = []
    pixels = 0
    for i, text in enumerate(encoded):
        try:
            # One format only: Pillow's many other decoders are not for data from the network.
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        except Image.DecompressionBombError:
            raise ValueError(f"{name} {i} alone has more pixels than any image may have") from None
        except (binascii.Error, ValueError, OSError) as error:
            raise ValueError(
                f"{name} {i} is not a PNG file in base64 ({type(error).__name__})"
            ) from None
        # Converting other modes here would hide a mistake of the client: alpha, or 16 bits.
        if image.mode != "RGB":
            raise ValueError(f"{name} {i} has mode {image.mode}, expected 8-bit RGB")
        if alike and images and image.size != images[0].size:
            raise ValueError(
                f"{name} {i} is {_size(image)}, image 0 is {_size(images[0])}; all images of a"
                " request must have the same size"
            )
        pixels += image.width * image.height
        # Inside the loop: the limit must hold before the next file is opened.
        if pixels > max_pixels:
            raise ValueError(
                f"more than {max_pixels} pixels in one request; send fewer or smaller images"
            )
        images.append(image)
    return images


def decode(images: list[Image.Image], name: str = "image") -> list[np.ndarray]:
    """Decode images to uint8 RGB [H, W, 3] each. ValueError names an image that is damaged."""
    arrays = []
    for i, image in enumerate(images):
        try:
            arrays.append(np.asarray(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{name} {i} is a damaged PNG file: {error}") from None
    return arrays


def as_media(images: list[np.ndarray], frames: int | None = None) -> np.ndarray:
    """Images of one size as uint8 RGB [n, H, W, 3], or, with `frames`, as videos [n / frames,
    frames, H, W, 3]."""
    stacked = np.stack(images)
    return stacked if frames is None else stacked.reshape(-1, frames, *stacked.shape[1:])


def decoded_bytes(images: list[Image.Image]) -> int:
    """Bytes of memory that RGB images will take once they are decoded."""
    return sum(3 * image.width * image.height for image in images)


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def write_answer(scores: Scores) -> dict:
    """The message with n scores."""
    values = [None if math.isnan(value) else value for value in scores.values.tolist()]
    return {"scores": values, "details": scores.details}


def read_answer(answer, n: int) -> Scores:
    """The scores in a server's answer about n images. ValueError unless it has n finite numbers or
    nulls and, if any, n texts."""
    if not isinstance(answer, dict) or not isinstance(answer.get("scores"), list):
        raise ValueError(f'expected an object with a list "scores", got {shown(answer)}')
    values, details = answer["scores"], answer.get("details")
    if len(values) != n:
        raise ValueError(f"{len(values)} scores for {n} images")
    for i, value in enumerate(values):
        if value is not None and (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not abs(value) <= _LARGEST
        ):
            raise ValueError(f"score {i} is {shown(value)}, expected a finite number or null")
    if details is not None and not (
        isinstance(details, list) and len(details) == n and all(isinstance(d, str) for d in details)
    ):
        raise ValueError(f'"details" must be {n} texts or null')
    return Scores(
        np.array([math.nan if value is None else value for value in values], dtype=np.float32),
        details,
    )
