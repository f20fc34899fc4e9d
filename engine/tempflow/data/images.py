"""Condition images beside prompts: files that a prompt file names, and columns of a dataset.

Files stay paths, so a prompt file of any length costs no memory for pixels: of each file the header
and the end are read once, when the prompts are read, and families and rewards decode it at use. A
dataset's images have no files; they are decoded here and kept.
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
# beside a prompt file: where names are looked up that are not found from the file's own folder
FOLDER = "images"
LEAST_SIDE, MOST_RATIO, MOST_PIXELS = 16, 16, 64_000_000
MOST_HELD = 4 << 30  # bytes of a dataset's decoded images, in each process
DEEP = ("I", "F")  # Pillow's modes of more than 8 bits a channel, whose conversion to RGB clips
ENDS, TAIL = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}, 64  # what the last bytes of a whole file hold
READERS = 16  # threads: headers come from a disk or a network that answers many at once


def with_images(prompts: list[Example], folder: Path) -> list[Example]:
    """Prompts of a file in `folder` with the images that their metadata name, which leave the
    metadata.

    "image" is a path and "images" a list of paths, either way round; null and [] name none. Paths
    are looked up from `folder`, then from its folder "images". UserError with the file and line,
    the key and the path for what is no image or of no sensible size.
    """
    named = [_named(prompt.metadata) for prompt in prompts]
    if not any(key in prompt.metadata for prompt in prompts for key in KEYS):
        return prompts
    files = _look_up(folder, [name for _, names in named for name in names])
    return [
        _with_files(prompt, key, [files[name] for name in names])
        for prompt, (key, names) in zip(prompts, named, strict=True)
    ]


def typed_images(given: Iterable, option: str) -> tuple[str | np.ndarray, ...]:
    """`Example.images` of files (named or as Path), PIL images or uint8 RGB arrays [H, W, 3].
    UserError, which begins with `option`."""
    return tuple(_typed(image, option) for image in given)


def problem_with(file: str) -> str | None:
    """Why a file cannot be a condition image, by its header and its end; None where nothing is
    wrong."""
    if not os.path.exists(file):
        return "does not exist"
    if not os.path.isfile(file):
        return "is no file"
    try:
        with Image.open(file) as image:
            problem = _problem_with_image(image)
            if problem is None and _seems_cut(file, image.format):
                # fails where it is cut; others only have something behind the image, as photos with
                # a video do
                image.load()
            return problem
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # Pillow raises each of them for damaged files
        return f"cannot be read as an image: {brief(error, 200)}"


def _seems_cut(file: str, kind: str | None) -> bool:
    """Whether a file does not end as a whole one does: most often a download that was broken
    off."""
    with open(file, "rb") as opened:
        opened.seek(-min(TAIL, os.path.getsize(file)), os.SEEK_END)
        return ENDS.get(kind or "", b"") not in opened.read()


def arrays_of(cells: list, source: str, column: str) -> tuple[np.ndarray, ...]:
    """A dataset's cells, each an image or a list of images, as uint8 RGB [H, W, 3]; None is none.
    UserError naming `source`."""
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
    """The key that names a prompt's images, and their names. UserError naming the prompt's file and
    line."""
    given = [key for key in KEYS if metadata.get(key) not in (None, [])]
    if not given:
        return "", []
    if len(given) > 1:
        raise UserError(f'{metadata["source"]}: gives "image" and "images"; one is expected')
    (key,), value = given, metadata[given[0]]
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(
            f'{metadata["source"]}: "{key}" must be the path of an image, or a list of paths, got'
            f" {shown(value)}"
        )
    return key, names


def _look_up(folder: Path, names: list[str]) -> dict[str, tuple[str, str | None]]:
    """The absolute path of each name, and what is wrong with that file."""
    different = list(dict.fromkeys(names))
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
    problem = problem_with(beside)
    if "://" in name:
        problem = "is an address; download the image and name the file"
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
            f"sides of {LEAST_SIDE} pixels and more, one at most {MOST_RATIO} times the other,"
            f" {MOST_PIXELS // 10**6} megapixels"
        )
        return f"is {width} x {height}; allowed are {allowed}"
    if image.mode.startswith(DEEP):
        return f"has more than 8 bits a channel (Pillow's mode {image.mode}); save it with 8"
    return None
