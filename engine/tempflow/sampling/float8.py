"""A second transformer for the coarse steps of suffixes, whose large linear layers multiply in
float8. It shares everything else with the first.

Weights have one scale per output channel, and activations one per token, computed in each forward.
Only layers that process every token are converted (`layers.token_layers`). States and their
velocities never come from this copy.
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
SIDES = 16  # the float8 product needs both sizes of a weight to be multiples of this


def float8_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers that are converted, by name: those of `token_layers` with sizes that the
    float8 product allows."""
    return {
        name: layer
        for name, layer in token_layers(transformer).items()
        if layer.in_features % SIDES == 0 and layer.out_features % SIDES == 0
    }


def float8_bytes(transformer: torch.nn.Module) -> int:
    """Bytes that the copy needs besides the transformer: one per weight, and fp32 scales."""
    return sum(
        layer.weight.numel() + 4 * layer.out_features
        for layer in float8_layers(transformer).values()
    )


def obstacle(transformer: torch.nn.Module) -> str | None:
    """Why a transformer can have no float8 copy on its device; None if it can. CPUs are allowed,
    though slow, so that the effect on rewards can be measured there."""
    layers = float8_layers(transformer)
    # The dtype of a layer to convert: Wan keeps some other weights in fp32.
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
        # Row-wise scales on a GPU come with bfloat16 outputs only.
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
    """`quantize_rows` of activations [..., k] that remembers its last result: the projections to
    queries, keys and values are given the same tensor one after another."""

    def __init__(self):
        # A weak reference to the last input, its version, and its rows. They are one tuple, so that
        # a thread never sees parts of two results; the rows are freed with their input.
        self._last: tuple | None = None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():  # a compiled forward cannot keep state in Python
            return quantize_rows(x.reshape(-1, x.shape[-1]))
        last = self._last
        # The version rises with each change in place, such as the next input of a static buffer.
        if last is not None and last[0]() is x and last[1] == x._version:
            return last[2]
        rows = quantize_rows(x.reshape(-1, x.shape[-1]))
        self._last = weakref.ref(x, self._forget), x._version, rows
        return rows

    def _forget(self, reference: weakref.ref) -> None:
        # Another thread may have stored a newer result since.
        last = self._last
        if last is not None and last[0] is reference:
            self._last = None


class Float8Linear(torch.nn.Module):
    """A linear layer x W^T + b whose product has both factors rounded to float8 (e4m3). W includes
    the adapter of its source.

    Args:
        source: the layer whose weight is rounded; its bias is shared.
        rounding: shared by layers that may be given the same x; default: one of its own.
    """

    def __init__(self, source: torch.nn.Linear, rounding: Rounding | None = None):
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
        """Convert the current weight of a layer, in place."""
        # In place, because CUDA graphs read the weights at their addresses.
        weight, scale = quantize_rows(whole_weight(source))
        self.weight.copy_(weight)
        self.scale.copy_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] of any float dtype; returns [..., out] in the same dtype."""
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
    """Round the rows of x [n, k] to float8 [n, k] with fp32 scales [n, 1]; their product is x up to
    rounding."""
    # All in the dtype of x: an fp32 copy of the activations would take twice their memory. A row of
    # zeros gets the smallest scale instead of a division by 0.
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    scale = (largest / LARGEST).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).to(FLOAT8), scale.float()


class Float8Copy:
    """A float8 copy of a transformer, in `transformer`. It keeps its storage for the whole run;
    `refresh` writes the source's current weights into it.

    Args:
        source: the transformer; it shares all layers that are not converted.

    Raises:
        UserError: there can be no copy, with the reason.
    """

    def __init__(self, source: torch.nn.Module):
        reason = obstacle(source)
        if reason:
            raise UserError(f'rollout.suffix.weights: "float8": {reason}')
        # A deep copy of the modules only: `deepcopy` takes what its memo has as already copied, so
        # all parameters and buffers stay shared.
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
        """The copy's own weights and scales, whose addresses must not change."""
        for _, converted in self._layers:
            yield from (converted.weight, converted.scale)
