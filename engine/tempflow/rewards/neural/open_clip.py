"""Renames the tensors of open_clip's ViT models, the format in which HPSv2 is published, to those
of transformers' `CLIPModel`."""

from __future__ import annotations

import re

import torch

from tempflow.errors import UserError

_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    # "layrnorm" is transformers' own spelling.
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")  # open_clip computes x @ W, a Linear x @ W.T
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def to_transformers(key: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename open_clip's tensors.

    Args:
        key: the option that the tensors come from, for error messages.
        tensors: by name. They may have a common prefix, such as "model." or "module.".

    Returns:
        The tensors of a `CLIPModel`; others are dropped.

    Raises:
        UserError: if the tensors are not open_clip's.
    """
    anchor = "visual.conv1.weight"  # its name tells the prefix
    prefixes = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
    if len(prefixes) != 1:
        raise UserError(
            f"{key}: expected the tensors of a CLIP ViT in transformers' or open_clip's layout, but"
            f" there is no {anchor!r}, or more than one"
        )
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(prefixes[0])
        if match := _BLOCK.fullmatch(name):
            renamed.update(_block(match, tensor))
        elif name in _NAMES:
            renamed[_NAMES[name]] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
    return renamed


def _block(match: re.Match, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rename a tensor of a transformer block. open_clip has queries, keys and values in one tensor,
    transformers in three."""
    visual, layer, part, kind = match.groups()
    block = f"{'vision' if visual else 'text'}_model.encoder.layers.{layer}."
    if part == "attn.in_proj":
        return {
            f"{block}self_attn.{x}_proj.{kind}": piece.contiguous()
            for x, piece in zip("qkv", tensor.chunk(3))
        }
    return {f"{block}{_IN_BLOCK[part]}.{kind}": tensor} if part in _IN_BLOCK else {}
