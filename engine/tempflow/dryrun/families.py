"""What a forward of each kind of transformer takes, as shapes: the one thing about a model that its configs do not say.

A new family is one function and one entry in `INPUTS`, by the transformer's class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch


@dataclass(frozen=True)
class Forward:
    """One forward of the transformer for a number of latents.

    arguments: of the transformer, on the meta device. latent: shape of one latent. conditioning: names of the arguments that
    are prompt embeddings. vae_latent: shape of what the VAE decodes for one picture.
    """

    arguments: dict
    latent: tuple[int, ...]
    conditioning: tuple[str, ...]
    vae_latent: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """Of a forward: latents in it, pixels, text tokens."""

    rows: int
    height: int
    width: int
    text: int


def flux(transformer: dict, vae: dict, size: Size, dtype: torch.dtype) -> Forward:
    """FLUX.1: packed 2 x 2 latents, text and picture tokens with position ids, guidance as an embedding."""
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    high, wide = size.height // factor, size.width // factor
    tokens = (high // 2) * (wide // 2)

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    arguments = {
        "hidden_states": empty(size.rows, tokens, transformer["in_channels"]),
        "timestep": empty(size.rows),
        "guidance": empty(size.rows, dtype=torch.float32) if transformer["guidance_embeds"] else None,
        "encoder_hidden_states": empty(size.rows, size.text, transformer["joint_attention_dim"]),
        "pooled_projections": empty(size.rows, transformer["pooled_projection_dim"]),
        "img_ids": empty(tokens, 3),
        "txt_ids": empty(size.text, 3),
        "return_dict": False,
    }
    return Forward(arguments, (tokens, transformer["in_channels"]), ("encoder_hidden_states", "pooled_projections"),
                   (vae["latent_channels"], high, wide))  # fmt: skip


INPUTS: dict[str, Callable[[dict, dict, Size, torch.dtype], Forward]] = {"FluxTransformer2DModel": flux}
