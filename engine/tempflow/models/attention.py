"""diffusers' attention backends: checking what a backend needs before a model is loaded, and
selecting it.

diffusers checks for the package only, after the model is loaded; a wrong GPU, dtype or mask shows
in the first forward, or not at all. Backends that are not in `BACKENDS` are not checked here.
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
    """What a backend needs."""

    package: str | None = None
    """Import name of the package."""
    install: str = ""
    """How to install the package."""
    gpu: bool = False
    """Whether it needs a GPU."""
    oldest: tuple[int, int] = (0, 0)
    """Lowest compute capability of an NVIDIA GPU."""
    newest: tuple[int, int] = (99, 0)
    """Highest compute capability of an NVIDIA GPU."""
    half: bool = False
    """Whether it computes in bfloat16 and float16 only."""
    masks: bool = True
    """Whether it accepts an attention mask."""


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
        # FlashAttention 3 is written for Hopper alone; later GPUs do not run its instructions.
        (9, 0),
        (9, 0),
        half=True,
        masks=False,
    ),
}


def check_attention(
    name: str | None, path: str, dtypes: dict[str, torch.dtype], guided_in_one: bool = False
) -> None:
    """Raise a UserError that lists everything a backend needs and this run does not have.

    Args:
        name: of the backend. Names that `BACKENDS` does not have are left to diffusers.
        path: of the checkpoint.
        dtypes: of the weights that will run with it, by config key.
        guided_in_one: whether a prompt and a negative prompt of another length share a forward, so
            that the shorter one is masked.
    """
    if name not in BACKENDS:
        return
    # All of them at once, so that a user does not fix one need to be told of the next.
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
    # Compute capabilities are NVIDIA's numbers; on AMD GPUs the package itself knows what it runs.
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
    # A backend that takes no mask may ignore the one it is given, and attend to padding.
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
    """Select a diffusers attention backend for a module; None keeps diffusers' default.

    Raises:
        UserError: the backend is unknown, or cannot run here.
    """
    if name is None:
        return
    # diffusers' method silently skips modules without backends.
    if not has_attention_backends(module):
        raise UserError(
            f"model.attention_backend: {name!r}: diffusers cannot change the backend of"
            f" {type(module).__name__}; set it to null"
        )
    try:
        module.set_attention_backend(name)
    # OSError: a kernel that cannot be fetched from the hub.
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise UserError(f"model.attention_backend: {name!r}: {error}") from None
