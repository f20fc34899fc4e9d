"""A second transformer for suffix rows whose large linear layers multiply in float8; everything
else it shares with the first.

Weights have a scale per output channel, activations one per token, found as they come. Only layers
that see every token are converted.
"""

from __future__ import annotations

import copy
import weakref
from typing import Iterator

import torch
from torch.nn import functional as F

from tempflow.errors import UserError
from tempflow.models.adapted import whole_weight
from tempflow.models.layers import token_layers

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SIDES = 16  # what both sides of a float8 product must be multiples of


def float8_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of the repeated blocks that see every token and whose sizes float8 products
    allow, by name."""
    return {
        name: layer
        for name, layer in token_layers(transformer).items()
        if layer.in_features % SIDES == 0 and layer.out_features % SIDES == 0
    }


def float8_bytes(transformer: torch.nn.Module) -> int:
    """What the copy holds beside the transformer itself: a byte a weight, and fp32 scales."""
    return sum(
        layer.weight.numel() + 4 * layer.out_features
        for layer in float8_layers(transformer).values()
    )


def obstacle(transformer: torch.nn.Module) -> str | None:
    """Why a transformer can have no float8 copy here; None where it can. A CPU can, slowly: to see
    what it does to rewards."""
    layers = float8_layers(transformer)
    # some others stay in fp32 (Wan)
    weight = next((layer.weight for layer in layers.values()), next(transformer.parameters()))
    if not hasattr(F, "scaled_mm"):
        return f"it needs torch 2.10 or later, this is {torch.__version__}"
    if weight.device.type == "cuda":
        name, capability = (
            torch.cuda.get_device_name(weight.device),
            torch.cuda.get_device_capability(weight.device),
        )
        if torch.version.hip:
            return f"it needs an NVIDIA GPU, this is {name}"
        if capability < (8, 9):
            return (
                f"it needs compute capability 8.9 or later, {name} has"
                f" {capability[0]}.{capability[1]}"
            )
        if weight.dtype != torch.bfloat16:
            return (
                "on a GPU it needs model.dtype bfloat16, not"
                f" {str(weight.dtype).removeprefix('torch.')}"
            )
    if not layers:
        return (
            f"{type(transformer).__name__} has no linear layer in its blocks whose sizes are"
            f" multiples of {SIDES}"
        )
    return None


class Rounding:
    """`quantize_rows` of activations [..., k], once for layers that are given the same tensor one
    after another, as the projections to queries, keys and values are."""

    def __init__(self):
        # A reference to the last input, its version, and its rows: one object, so that threads
        # never see parts of two. The rows go when their input goes.
        self._last: tuple | None = None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():  # a compiled forward keeps nothing in Python
            return quantize_rows(x.reshape(-1, x.shape[-1]))
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version:
            return last[2]
        rows = quantize_rows(x.reshape(-1, x.shape[-1]))
        self._last = weakref.ref(x, self._forget), x._version, rows
        return rows

    def _forget(self, reference: weakref.ref) -> None:
        last = self._last
        if last is not None and last[0] is reference:
            self._last = None


class Float8Linear(torch.nn.Module):
    """x W^T + b with both factors of the product rounded to float8 (e4m3); W with its adapter,
    where it has one. x: [..., in_features] of any float dtype."""

    def __init__(self, source: torch.nn.Linear, rounding: Rounding | None = None):
        """rounding: shared with layers that may be given the same x."""
        super().__init__()
        self._rounding = rounding or Rounding()
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        weight, scale = quantize_rows(whole_weight(source))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = source.bias

    @torch.no_grad()
    def refresh(self, source: torch.nn.Linear) -> None:
        """Take over another weight, in place."""
        weight, scale = quantize_rows(whole_weight(source))
        self.weight.copy_(weight)
        self.scale.copy_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = self._rounding(x)
        by_row = F.ScalingType.RowWise
        product = F.scaled_mm(
            rows,
            self.weight.t(),
            scale,
            by_row,
            self.scale.t(),
            by_row,
            bias=self.bias,
            output_dtype=x.dtype,
            use_fast_accum=True,
        )
        return product.reshape(*x.shape[:-1], -1)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8 [n, k], fp32 scales [n, 1]) whose product is x [n, k] up to rounding. Nothing in
    between is wider than x."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    scale = (largest / LARGEST).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).to(FLOAT8), scale.float()


class Float8Copy:
    """transformer: the copy. It keeps its storage for the whole run; `refresh` writes the source's
    weights into it.

    Raises UserError with the reason where there can be none.
    """

    def __init__(self, source: torch.nn.Module):
        reason = obstacle(source)
        if reason:
            raise UserError(f'rollout.suffix.weights: "float8": {reason}')
        shared = {id(tensor): tensor for tensor in (*source.parameters(), *source.buffers())}
        self.transformer = copy.deepcopy(source, shared)
        rounding = Rounding()
        self._layers = [
            (layer, Float8Linear(layer, rounding)) for layer in float8_layers(source).values()
        ]
        for name, (_, converted) in zip(float8_layers(source), self._layers, strict=True):
            self.transformer.set_submodule(name, converted)

    def refresh(self) -> None:
        """Convert the source's current weights, in place."""
        for layer, converted in self._layers:
            converted.refresh(layer)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Where its own weights lie."""
        for _, converted in self._layers:
            yield from (converted.weight, converted.scale)
