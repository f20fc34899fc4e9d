"""A linear layer with a LoRA adapter beside its frozen weight, for rollouts: the weight is another
module's own tensor, never a merged one.

Its forward is x W^T + b, to which (x A^T) B^T x alpha / rank is added in one product with
accumulation: two small products and no tensor of the output's size more than the layer without an
adapter has. peft's layer, which training goes through, makes three more and rounds each.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tempflow.models.lora import merged
from tempflow.models.quantized import QuantizedLinear


class _Adapter:
    """An adapter beside the product of the class that comes next.

    down: [rank, in], up: [out, rank]. scale: alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    in_features: int
    out_features: int

    def _add_adapter(self, rank: int, scale: float, like: torch.Tensor) -> None:
        """One that is zero until it is written, of the dtype and on the device of a tensor."""
        self.scale = scale
        for name, shape in (("down", (rank, self.in_features)), ("up", (self.out_features, rank))):
            zeros = torch.nn.Parameter(like.new_zeros(shape), requires_grad=False)
            setattr(self, name, zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]; returns [..., out]."""
        out = super().forward(x)  # type: ignore[misc]  # of the class that comes next
        low = F.linear(x, self.down)
        out.view(-1, self.out_features).addmm_(
            low.view(-1, low.shape[-1]), self.up.t(), alpha=self.scale
        )
        return out


class AdaptedLinear(_Adapter, torch.nn.Linear):
    """`source`, whose weight and bias it shares, with an adapter of its own in the weight's dtype
    on its device.

    weight: [out, in]; bias: [out] or None.
    """

    def __init__(self, source: torch.nn.Linear, rank: int, scale: float):
        torch.nn.Module.__init__(self)  # torch.nn.Linear's own would make a weight
        self.in_features, self.out_features = source.in_features, source.out_features
        self.weight = source.weight
        self.register_parameter("bias", source.bias)
        self._add_adapter(rank, scale, source.weight.detach())


class AdaptedQuantized(_Adapter, QuantizedLinear):
    """The same of a layer whose weight is packed; the adapter has the dtype that the weight had."""

    def __init__(self, source: QuantizedLinear, rank: int, scale: float):
        self._share(source)
        self._add_adapter(
            rank, scale, torch.empty(0, dtype=source.dtype, device=self.weight.device)
        )


def adapted(source: torch.nn.Linear, rank: int, scale: float) -> AdaptedLinear | AdaptedQuantized:
    """A layer with an adapter that is zero until it is written, beside the layer's own weight."""
    if isinstance(source, QuantizedLinear):
        return AdaptedQuantized(source, rank, scale)
    return AdaptedLinear(source, rank, scale)


def whole_weight(layer: torch.nn.Linear) -> torch.Tensor:
    """The one weight [out, in] that a layer applies, in its dtype: an adapter merged, where it has
    one."""
    if not isinstance(layer, AdaptedLinear):
        return layer.weight.detach()
    return merged(layer.weight.detach(), layer.down, layer.up, layer.scale).to(layer.weight.dtype)
