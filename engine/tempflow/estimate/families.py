"""What a forward of each kind of transformer takes, as shapes: the one thing about a model that its configs do not say.

A new family is one function and one entry in `INPUTS`, by the transformer's class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch

from tempflow import types
from tempflow.models.sd3 import PATCH, token_grid

Configs = Callable[[str], dict]  # the config of one of the checkpoint's parts, defaults filled in


@dataclass(frozen=True)
class Forward:
    """One forward of the transformer for a number of latents.

    arguments: of the transformer, on the meta device. latent: shape of one latent. conditioning: names of the arguments that
    are prompt embeddings. vae_latent: shape of what the VAE decodes for one picture. halves: rows of the transformer for a
    latent, 2 with classifier-free guidance; the arguments are then made for this forward, by joining both halves.
    negatives: whether a negative prompt's embeddings are kept beside a prompt's.
    """

    arguments: dict
    latent: tuple[int, ...]
    conditioning: tuple[str, ...]
    vae_latent: tuple[int, ...]
    halves: int = 1
    negatives: bool = False


@dataclass(frozen=True)
class Size:
    """Of a forward: latents in it, pixels, text tokens; guided: whether the guidance scale asks for both halves."""

    rows: int
    height: int
    width: int
    text: int
    guided: bool = False


def flux(configs: Configs, size: Size, dtype: torch.dtype) -> Forward:
    """FLUX.1: packed 2 x 2 latents, text and picture tokens with position ids, guidance as an embedding."""
    transformer, vae = configs("transformer"), configs("vae")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    high, wide = size.height // factor, size.width // factor
    tokens = (high // 2) * (wide // 2)
    arguments = {
        "hidden_states": _empty(dtype, size.rows, tokens, transformer["in_channels"]),
        "timestep": _empty(dtype, size.rows),
        "guidance": _empty(torch.float32, size.rows) if transformer["guidance_embeds"] else None,
        "encoder_hidden_states": _empty(dtype, size.rows, size.text, transformer["joint_attention_dim"]),
        "pooled_projections": _empty(dtype, size.rows, transformer["pooled_projection_dim"]),
        "img_ids": _empty(dtype, tokens, 3),
        "txt_ids": _empty(dtype, size.text, 3),
        "return_dict": False,
    }
    return Forward(arguments, (tokens, transformer["in_channels"]), ("encoder_hidden_states", "pooled_projections"),
                   (vae["latent_channels"], high, wide))  # fmt: skip


def sd3(configs: Configs, size: Size, dtype: torch.dtype) -> Forward:
    """Stable Diffusion 3: latents as they are; the CLIP encoders' tokens stand before T5's."""
    transformer, vae = configs("transformer"), configs("vae")
    rows, columns = token_grid(types.Size(size.height, size.width), vae, transformer)
    tokens, halves = configs("text_encoder")["max_position_embeddings"] + size.text, 1 + size.guided
    n, latent = halves * size.rows, (transformer["in_channels"], PATCH * rows, PATCH * columns)
    arguments = {
        "hidden_states": _empty(dtype, n, *latent),
        "timestep": _empty(torch.float32, n),
        "encoder_hidden_states": _empty(dtype, n, tokens, transformer["joint_attention_dim"]),
        "pooled_projections": _empty(dtype, n, transformer["pooled_projection_dim"]),
        "return_dict": False,
    }
    return Forward(arguments, latent, ("encoder_hidden_states", "pooled_projections"), latent, halves, negatives=True)


def qwen_image(configs: Configs, size: Size, dtype: torch.dtype) -> Forward:
    """Qwen-Image: packed 2 x 2 latents, text padded to its longest with a mask, a VAE of videos of one picture."""
    transformer, vae = configs("transformer"), configs("vae")
    factor = 2 ** len(vae["temperal_downsample"])
    high, wide = size.height // factor, size.width // factor
    grid, halves = (1, high // 2, wide // 2), 1 + size.guided
    n, latent = halves * size.rows, (grid[1] * grid[2], transformer["in_channels"])
    arguments = {
        "hidden_states": _empty(dtype, n, *latent),
        "timestep": _empty(dtype, n),
        "img_shapes": [[grid]] * n,
        "encoder_hidden_states": _empty(dtype, n, size.text, transformer["joint_attention_dim"]),
        "encoder_hidden_states_mask": _empty(torch.bool, n, size.text),
        "return_dict": False,
    }
    return Forward(arguments, latent, ("encoder_hidden_states", "encoder_hidden_states_mask"), (vae["z_dim"], 1, high, wide),
                   halves, negatives=True)  # fmt: skip


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


INPUTS: dict[str, Callable[[Configs, Size, torch.dtype], Forward]] = {
    "FluxTransformer2DModel": flux, "QwenImageTransformer2DModel": qwen_image, "SD3Transformer2DModel": sd3,
}  # fmt: skip
