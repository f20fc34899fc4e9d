"""Linear layers with a LoRA adapter for rollouts, which share the frozen weight of another module.

The forward computes x W^T + b and adds (alpha / rank) (x A^T) B^T to it in place. Compared with the
layer without an adapter that is two small products and no further tensor of the output's size;
peft's layer, which training uses, makes three such tensors and rounds each. The adapter is never
merged into the weight, because the training engine uses the same tensor.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tempflow.models.lora import merged
from tempflow.models.quantized import QuantizedLinear


class _Adapter:
    """A mixin that adds an adapter to the output of the linear layer that follows it in the base
    classes."""

    down: torch.Tensor
    """A, [rank, in]."""
    up: torch.Tensor
    """B, [out, rank]."""
    scale: float
    """alpha / rank."""
    in_features: int
    out_features: int

    def _add_adapter(self, rank: int, scale: float, like: torch.Tensor) -> None:
        """Create a zero adapter with the dtype and device of a tensor. Its owner writes it in
        place before each rollout."""
        self.scale = scale
        for name, shape in (("down", (rank, self.in_features)), ("up", (self.out_features, rank))):
            zeros = torch.nn.Parameter(like.new_zeros(shape), requires_grad=False)
            setattr(self, name, zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]; returns [..., out]."""
        out = super().forward(x)  # type: ignore[misc]  # the linear layer that follows the mixin
        low = F.linear(x, self.down)
        # In place: rollouts need no gradient, and `out` is this layer's own tensor. The scale is
        # applied inside the product, so nothing is rounded between product and sum.
        out.view(-1, self.out_features).addmm_(
            low.view(-1, low.shape[-1]), self.up.t(), alpha=self.scale
        )
        return out


class AdaptedLinear(_Adapter, torch.nn.Linear):
    """A layer that shares weight [out, in] and bias [out] with `source`, with an adapter of its
    own.

    Args:
        source: the layer without an adapter; it gives the adapter's dtype and device.
        rank: of the adapter.
        scale: alpha / rank.
    """

    def __init__(self, source: torch.nn.Linear, rank: int, scale: float):
        # torch.nn.Linear's constructor would allocate a second weight.
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.weight = source.weight
        self.register_parameter("bias", source.bias)
        self._add_adapter(rank, scale, source.weight.detach())


class AdaptedQuantized(_Adapter, QuantizedLinear):
    """The same for a layer with a quantized weight. The adapter has the dtype that the weight had
    before it was packed."""

    def __init__(self, source: QuantizedLinear, rank: int, scale: float):
        self._share(source)
        self._add_adapter(
            rank, scale, torch.empty(0, dtype=source.dtype, device=self.weight.device)
        )


def adapted(source: torch.nn.Linear, rank: int, scale: float) -> AdaptedLinear | AdaptedQuantized:
    """A layer that shares the weight of `source`, quantized or not, with a zero adapter."""
    if isinstance(source, QuantizedLinear):
        return AdaptedQuantized(source, rank, scale)
    return AdaptedLinear(source, rank, scale)


def whole_weight(layer: torch.nn.Linear) -> torch.Tensor:
    """The weight [out, in] that a layer applies, in the layer's dtype. An adapter is merged into a
    copy."""
    # Not for `AdaptedQuantized`: float8 copies, which ask for this, are refused with
    # `model.quantize`.
    if not isinstance(layer, AdaptedLinear):
        return layer.weight.detach()
    return merged(layer.weight.detach(), layer.down, layer.up, layer.scale).to(layer.weight.dtype)
