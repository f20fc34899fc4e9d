"""diffusers' attention backends: what those that this project names need, checked before a model is
loaded, and choosing one.

diffusers itself checks packages alone, when the model is there, and the rest in the first forward,
if at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from tempflow.compat import has_attention_backends
from tempflow.errors import UserError
from tempflow.models.loading import family_of
from tempflow.run.environment import uses_gpu


@dataclass(frozen=True)
class Needs:
    """What a backend runs with."""

    package: str | None = None
    """its name when imported"""
    install: str = ""
    """how it is installed"""
    gpu: bool = False
    oldest: tuple[int, int] = (0, 0)
    """compute capability of an NVIDIA GPU, at least"""
    newest: tuple[int, int] = (99, 0)
    half: bool = False
    """bfloat16 and float16 only"""
    masks: bool = True
    """whether it takes a mask of the text"""


BACKENDS = {
    "native": Needs(),
    "xformers": Needs("xformers", "pip install xformers, part of the extra gpu", gpu=True),
    "flash": Needs(
        "flash_attn",
        "pip install --no-build-isolation flash-attn, which compiles it with nvcc",
        True,
        (8, 0),
        half=True,
        masks=False,
    ),
    "_flash_3_hub": Needs(
        "kernels",
        "pip install kernels, which fetches the kernel from the Hugging Face hub",
        True,
        (9, 0),
        (9, 0),
        half=True,
        masks=False,
    ),
}


def check_attention(
    name: str | None, path: str, dtypes: dict[str, torch.dtype], guided_in_one: bool = False
) -> None:
    """UserError where a backend lacks something here; those not in `BACKENDS` are left to
    diffusers.

    path: the checkpoint's. dtypes: of the weights that will run with it, by config key.
    guided_in_one: whether a prompt and a negative prompt of another length share forwards.
    """
    if name not in BACKENDS:
        return
    missing = list(_missing(BACKENDS[name], path, dtypes, guided_in_one))
    if missing:
        raise UserError(
            f'model.attention_backend: {name!r} needs {"; ".join(missing)}. "native" needs nothing'
            " but torch"
        )


def _missing(needs: Needs, path: str, dtypes: dict[str, torch.dtype], guided_in_one: bool):
    if needs.package and find_spec(needs.package) is None:
        yield f"the package {needs.package}, which is not installed ({needs.install})"
    if needs.gpu and not uses_gpu():
        yield "a GPU, and this run is on the CPU"
    elif needs.gpu and not torch.version.hip:
        capability = torch.cuda.get_device_capability()
        if not needs.oldest <= capability <= needs.newest:
            exactly = "" if needs.newest == needs.oldest else " or later"
            wanted = f"{'.'.join(map(str, needs.oldest))}{exactly}"
            yield (
                f"compute capability {wanted}, and {torch.cuda.get_device_name()} has"
                f" {'.'.join(map(str, capability))}"
            )
    for key, dtype in dtypes.items():
        if needs.half and dtype not in (torch.bfloat16, torch.float16):
            yield f"bfloat16 or float16, and {key} gives {str(dtype).removeprefix('torch.')}"
    if not needs.masks and family_of(path).masks_text:
        yield (
            f"text without a mask, and {family_of(path).__name__.removesuffix('Policy')} masks its"
            " text"
        )
    elif not needs.masks and guided_in_one:
        name = family_of(path).__name__.removesuffix("Policy")
        yield (
            f"text without a mask, and with guidance under ZeRO-3 {name} masks the shorter one of"
            " prompt and negative prompt"
        )


def set_attention_backend(module: Any, name: str | None) -> None:
    """Choose a diffusers attention backend; UserError with the reason where it is unknown or cannot
    run here."""
    if name is None:
        return
    if not has_attention_backends(module):
        raise UserError(
            f"model.attention_backend: {name!r}: diffusers offers no choice for"
            f" {type(module).__name__}; leave it null"
        )
    try:
        module.set_attention_backend(name)
    except (
        ValueError,
        RuntimeError,
        ImportError,
        OSError,
    ) as error:  # OSError: the hub, for kernels that come from there
        raise UserError(f"model.attention_backend: {name!r}: {error}") from None
