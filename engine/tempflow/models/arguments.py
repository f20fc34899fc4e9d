"""Checks of the arguments of the library functions `load_policy` and `Policy.sample`.

Each error names the argument, the value and what is allowed. Values that a config can hold raise
UserError, since commands pass them on; mistakes that only a Python caller can make raise
ValueError.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from tempflow.errors import UserError, brief, counted, shown
from tempflow_kernels.dispatch import use_triton

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def one_of(name: str, value, allowed: Sequence[str]) -> str:
    """The value, or a UserError if it is not one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{name}: {shown(value)}; allowed are {', '.join(map(repr, allowed))}")
    return value


def as_dtype(value: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name, or the dtype itself; UserError unless `DTYPES` has it."""
    if isinstance(value, torch.dtype) and value in DTYPES.values():
        return value
    return DTYPES[
        one_of(
            "dtype",
            str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value,
            [*DTYPES, "auto"],  # only named in the error: callers resolve "auto" themselves
        )
    ]


def check_device(value: str | torch.device) -> None:
    """Raise a UserError for a device that does not exist here, or that cannot run the kernels which
    the environment variable TEMPFLOW_KERNELS asks for."""
    try:
        # Reads a value back, so that "meta", which can allocate but holds no values, is refused.
        torch.zeros(1, device=torch.device(value)).tolist()
    except Exception as error:  # backends raise RuntimeError, AssertionError or others
        here = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        raise UserError(
            f"device: {shown(value)} is not there ({brief(error, 160)}); this machine has"
            f" {', '.join(here)}"
        ) from None
    try:
        use_triton(torch.device(value))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None


def positive_int(name: str, value, most: float = math.inf) -> int:
    """The value as int, or a ValueError if it is no whole number from 1 to `most`."""
    # numbers.Integral admits numpy's integers; True is an Integral too, and surely a mistake.
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not 1 <= value <= most:
        raise ValueError(
            f"{name}: expected a whole number from 1 {'on' if most == math.inf else f'to {most}'},"
            f" got {shown(value)}"
        )
    return int(value)


def finite_number(name: str, value) -> float:
    """The value as float, or a ValueError if it is no finite number."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # "not <=" instead of ">": NaN compares false either way. The bound also catches whole numbers
    # that no float can hold.
    if not real or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {shown(value)}")
    return float(value)


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """A list of prompts from a text or a list of texts, as in diffusers' pipelines."""
    texts = [prompts] if isinstance(prompts, str) else _texts("prompts", prompts)
    if not texts:
        raise ValueError("prompts: expected at least one, got an empty list")
    return texts


def as_negative_prompts(negatives: str | Sequence[str] | None, count: int) -> list[str] | None:
    """A list of `count` negative prompts. One text stands for all of them, as in diffusers'
    pipelines."""
    if negatives is None:
        return None
    texts = (
        [negatives] * count if isinstance(negatives, str) else _texts("negative_prompts", negatives)
    )
    if len(texts) != count:
        raise ValueError(
            f"negative_prompts: {len(texts)} for {counted(count, 'prompt')}; expected one text"
            " for all, or one for each"
        )
    return texts


def as_images(images, count: int, alone: bool) -> list[tuple[np.ndarray, ...]]:
    """The condition images of each prompt, uint8 RGB [H, W, 3] of any size.

    Args:
        images: a list with one entry per prompt, each a PIL image or a list of PIL images; None for
            no images.
        count: number of prompts.
        alone: whether the prompt was a single text; `images` is then the entry of that prompt.
    """
    if images is None:
        return [()] * count
    if alone:
        return [_pixels("images", images)]
    if not isinstance(images, (list, tuple)):
        raise ValueError(
            f"images: expected a list with an entry for each prompt, got {type(images).__name__}"
        )
    if len(images) != count:
        raise ValueError(
            f"images: {len(images)} entries for {counted(count, 'prompt')}; expected one"
            " entry for each"
        )
    return [_pixels(f"images[{n}]", entry) for n, entry in enumerate(images)]


def _pixels(name: str, entry) -> tuple[np.ndarray, ...]:
    given = entry if isinstance(entry, (list, tuple)) else [entry]
    for image in given:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"{name}: expected a PIL image or a list of PIL images, got {shown(image)}"
            )
    return tuple(np.asarray(image.convert("RGB")) for image in given)


def _texts(name: str, values) -> list[str]:
    # All of these can be iterated, but yield numbers, keys, or texts in an arbitrary order.
    if isinstance(values, (bytes, dict, set)) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name}: expected a text or a list of texts, got {type(values).__name__}")
    texts = list(values)
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected texts, but number {n} is {shown(text)}")
        # Python strings may hold lone surrogates (json.loads makes them), which fail deep inside
        # the tokenizers with an encoding error.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"{name}: number {n} holds half a character (a lone surrogate), which tokenizers"
                f" cannot encode: {shown(text)}"
            )
    return texts


def check_latents(latents, expected: tuple[int, ...], size: str) -> None:
    """Raise a ValueError unless latents are a finite floating-point tensor of the expected shape.
    `size` is how the error names the size of the outputs."""
    if not isinstance(latents, torch.Tensor):
        hint = "; torch.from_numpy converts it" if type(latents).__module__ == "numpy" else ""
        raise ValueError(
            f"latents: expected a tensor of shape {expected} for {size}, got"
            f" {type(latents).__name__}{hint}"
        )
    if tuple(latents.shape) != expected:
        raise ValueError(
            f"latents: expected shape {expected} for {size}, got {tuple(latents.shape)}"
        )
    if latents.is_meta or latents.layout != torch.strided:
        raise ValueError(
            f"latents: expected a dense tensor with its numbers, got one on {latents.device} of"
            f" layout {latents.layout}"
        )
    if not latents.is_floating_point():
        raise ValueError(f"latents: expected floating-point numbers, got {latents.dtype}")
    if not torch.isfinite(latents).all():
        raise ValueError("latents: hold NaN or infinity")
