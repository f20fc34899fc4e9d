"""Heads of neural rewards: linear layers from an embedding to one number, computed in float32
whatever the model's dtype."""

from __future__ import annotations

import re
from typing import Callable

import torch
import torch.nn.functional as F

from tempflow.errors import UserError

_WEIGHT = re.compile(r"(?:(?:.*\.)?layers\.(\d+)|predictor|linear)\.weight|weight")


class Head:
    """Linear layers applied one after another; the result is the last layer's first output.

    Args:
        layers: weights [out, in] and biases [out], in order.
        device: "cpu" or "cuda".
        between: applied between the layers; the identity by default.
    """

    def __init__(
        self,
        layers: list[tuple[torch.Tensor, torch.Tensor]],
        device: str,
        between: Callable = lambda x: x,
    ):
        self.width = layers[0][0].shape[1]
        self._layers = [
            (weight.to(device, torch.float32), bias.to(device, torch.float32))
            for weight, bias in layers
        ]
        self._between = between

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [n, width] -> fp32 [n]."""
        for i, (weight, bias) in enumerate(self._layers):
            x = F.linear(self._between(x) if i else x, weight, bias)
        return x[:, 0]


def linear_head(key: str, tensors: dict[str, torch.Tensor], device: str) -> Head:
    """Find a head's layers by their names: `layers.N.weight` of an MLP, or `predictor.weight`,
    `linear.weight` or `weight` of a single layer. Other tensors are ignored.

    Args:
        key: the option that the tensors come from, for error messages.
        tensors: by name.
        device: "cpu" or "cuda".

    Raises:
        UserError: unless the layers have biases and lead from an embedding to one number.
    """
    # Sorted by N as a number: as texts, layers.10 would come before layers.2. The published MLP's
    # N have gaps, where dropout was.
    found = [
        (int(match[1] or 0), name)
        for name in tensors
        if (match := _WEIGHT.fullmatch(name)) and tensors[name].ndim == 2
    ]
    names = [
        name.removesuffix("weight")
        for _, name in sorted(found)
        if not name.startswith(("vision_model.", "text_model."))  # layers.N of the CLIP model
    ]
    layers = [
        (tensors[name + "weight"], tensors[name + "bias"])
        for name in names
        if name + "bias" in tensors
    ]
    widths = [weight.shape[1] for weight, _ in layers] + [1]
    fit = len(layers) == len(names) and all(
        weight.shape[0] == after for (weight, _), after in zip(layers, widths[1:])
    )
    if not layers or not fit:
        shapes = (
            ", ".join(f"{name}weight {list(tensors[name + 'weight'].shape)}" for name in names)
            or "no linear layers"
        )
        raise UserError(
            f"{key}: expected linear layers with biases from an embedding to one number, got"
            f" {shapes}"
        )
    return Head(layers, device)
