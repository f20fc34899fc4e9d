"""Condition images of prompts: files named in a prompt file, columns of a dataset, and command-line
options.

Files stay paths, so a long prompt file takes no memory for pixels. When the prompts are read, only
the header and the last bytes of each file are checked; families and rewards decode the file when
they use it. Images of a dataset have no files of their own; they are decoded here and kept.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Iterable

import numpy as np
from PIL import Image, ImageOps

from tempflow.errors import UserError, brief, shown
from tempflow.types import Example

KEYS = ("image", "images")
# A folder beside the prompt file, in which names are looked up second. Flow-Factory's data has it.
FOLDER = "images"
LEAST_SIDE, MOST_RATIO = 16, 16  # pixels; longer side over shorter side
MOST_PIXELS = 64_000_000  # of one image, which takes 192 MB once it is decoded
MOST_HELD = 4 << 30  # bytes of a dataset's decoded images, in each process
# First letters of Pillow's modes with more than 8 bits a channel: converting them to RGB clips
# their values instead of scaling them, which would turn a 16-bit photo white.
DEEP = ("I", "F")
# Markers in the last TAIL bytes of a complete file. In a PNG file a checksum follows its marker, in
# a JPEG file there may be padding.
ENDS, TAIL = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}, 64
READERS = 16  # threads; reading headers waits for a disk or a network, not for the CPU


def with_images(prompts: list[Example], folder: Path) -> list[Example]:
    """Move the images that the prompts' metadata name into `Example.images`.

    Either key, "image" or "images", may hold a path or a list of paths; null and [] mean no image.
    A path is looked up from `folder`, then from its subfolder "images".

    Args:
        prompts: the prompts of one file.
        folder: the folder of that file.

    Returns:
        The prompts with absolute paths as images and without the two keys in their metadata.

    Raises:
        UserError: for a file that is missing, damaged or of an unusable size; names the prompt
            file and line, the key and the path.
    """
    named = [_named(prompt.metadata) for prompt in prompts]
    if not any(key in prompt.metadata for prompt in prompts for key in KEYS):
        return prompts  # the same objects, without starting threads
    files = _look_up(folder, [name for _, names in named for name in names])
    return [
        _with_files(prompt, key, [files[name] for name in names])
        for prompt, (key, names) in zip(prompts, named, strict=True)
    ]


def typed_images(given: Iterable, option: str) -> tuple[str | np.ndarray, ...]:
    """`Example.images` from what a caller gives: files (str or Path), PIL images, or uint8 RGB
    arrays [H, W, 3]. UserError, beginning with `option`, for anything else."""
    return tuple(_typed(image, option) for image in given)


def problem_with(file: str) -> str | None:
    """Why a file cannot be a condition image, judged by its header and its last bytes; None if it
    can."""
    if not os.path.exists(file):
        return "does not exist"
    if not os.path.isfile(file):
        return "is not a file"
    try:
        with Image.open(file) as image:
            problem = _problem_with_image(image)
            if problem is None and _seems_cut(file, image.format):
                # Decoding raises for a truncated file. It does not for a complete one that has
                # something appended, as photos with an embedded video have.
                image.load()
            return problem
    # Pillow raises each of these for damaged files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"cannot be read as an image: {brief(error, 200)}"


def _seems_cut(file: str, kind: str | None) -> bool:
    """Whether a file lacks its format's end marker, as an interrupted download does."""
    with open(file, "rb") as opened:
        # seeking to before the beginning of a file shorter than TAIL would raise
        opened.seek(-min(TAIL, os.path.getsize(file)), os.SEEK_END)
        # b"" is in everything: formats without a known marker pass
        return ENDS.get(kind or "", b"") not in opened.read()


def arrays_of(cells: list, source: str, column: str) -> tuple[np.ndarray, ...]:
    """Decode the image cells of a dataset's row.

    Args:
        cells: PIL images, lists of them, or None for no image.
        source: the row, for error messages.
        column: the columns' names, for error messages.

    Returns:
        uint8 RGB [H, W, 3] each, upright.

    Raises:
        UserError: for a cell that is not an image, or an image of an unusable size.
    """
    found = []
    for image in (
        one
        for cell in cells
        for one in (cell if isinstance(cell, list) else [cell])
        if one is not None
    ):
        if not isinstance(image, Image.Image):
            raise UserError(
                f"{source}: {column}: expected an image or a list of images (a column of type"
                f" Image), got {shown(image)}"
            )
        if problem := _problem_with_image(image):
            raise UserError(f"{source}: {column}: an image {problem}")
        # Turned as EXIF says, like files are when they are used; an array has no EXIF data.
        found.append(np.array(ImageOps.exif_transpose(image).convert("RGB")))
    return tuple(found)


def _typed(image, option: str) -> str | np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        file = os.path.abspath(image)
        if problem := problem_with(file):
            raise UserError(f"{option}: {file} {problem}")
        return file
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[-1] == 3
    ):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(
            f"{option}: expected files, PIL images or uint8 arrays [H, W, 3], got {shown(image)}"
        )
    return arrays_of([image], option, "image")[0]


def _named(metadata: dict) -> tuple[str, list[str]]:
    """(key, names) of the images that a prompt's metadata name; ("", []) for none. UserError with
    the prompt's file and line."""
    given = [key for key in KEYS if metadata.get(key) not in (None, [])]
    if not given:
        return "", []
    if len(given) > 1:
        raise UserError(
            f'{metadata["source"]}: gives both "image" and "images"; leave one of them out'
        )
    (key,), value = given, metadata[given[0]]
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(
            f'{metadata["source"]}: "{key}" must be the path of an image, or a list of paths, got'
            f" {shown(value)}"
        )
    return key, names


def _look_up(folder: Path, names: list[str]) -> dict[str, tuple[str, str | None]]:
    """For each name its absolute path and the problem with that file, or None."""
    different = list(dict.fromkeys(names))  # many prompts may edit one image; check it once
    with ThreadPoolExecutor(READERS) as readers:
        return dict(
            zip(different, readers.map(lambda name: _found(folder, name), different), strict=True)
        )


def _found(folder: Path, name: str) -> tuple[str, str | None]:
    beside, inside = (
        os.path.abspath(os.path.join(place, name)) for place in (folder, folder / FOLDER)
    )
    if not os.path.exists(beside) and os.path.exists(inside):
        return inside, problem_with(inside)
    problem = problem_with(beside)  # a file in neither folder is reported as missing here
    if "://" in name:
        problem = "is a URL; download the image and name the file"
    return beside, problem


def _with_files(prompt: Example, key: str, files: list[tuple[str, str | None]]) -> Example:
    for file, problem in files:
        if problem:
            raise UserError(f'{prompt.metadata["source"]}: "{key}": {shown(file, 300)} {problem}')
    metadata = {name: value for name, value in prompt.metadata.items() if name not in KEYS}
    return replace(prompt, images=tuple(file for file, _ in files), metadata=metadata)


def _problem_with_image(image: Image.Image) -> str | None:
    width, height = image.size
    if (
        min(width, height) < LEAST_SIDE
        or max(width, height) > MOST_RATIO * min(width, height)
        or width * height > MOST_PIXELS
    ):
        allowed = (
            f"sides of at least {LEAST_SIDE} pixels, one at most {MOST_RATIO} times the other, and"
            f" at most {MOST_PIXELS // 10**6} megapixels"
        )
        return f"is {width} x {height}; allowed are {allowed}"
    if image.mode.startswith(DEEP):
        return f"has more than 8 bits a channel (Pillow's mode {image.mode}); save it with 8 bits"
    return None
