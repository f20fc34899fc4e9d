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


class AdaptedLinear(torch.nn.Linear):
    """`source`, whose weight and bias it shares, with an adapter of its own that is zero until it
    is written.

    weight: [out, in]; bias: [out] or None; down: [rank, in], up: [out, rank], in the weight's dtype
    on its device. scale: alpha / rank.
    """

    def __init__(self, source: torch.nn.Linear, rank: int, scale: float):
        torch.nn.Module.__init__(self)  # torch.nn.Linear's own would make a weight
        self.in_features, self.out_features, self.scale = (
            source.in_features,
            source.out_features,
            scale,
        )
        self.weight = source.weight
        self.register_parameter("bias", source.bias)
        weight = source.weight.detach()
        self.down = torch.nn.Parameter(
            weight.new_zeros(rank, self.in_features), requires_grad=False
        )
        self.up = torch.nn.Parameter(weight.new_zeros(self.out_features, rank), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]; returns [..., out]."""
        out, low = super().forward(x), F.linear(x, self.down)
        out.view(-1, self.out_features).addmm_(
            low.view(-1, low.shape[-1]), self.up.t(), alpha=self.scale
        )
        return out


def whole_weight(layer: torch.nn.Linear) -> torch.Tensor:
    """The one weight [out, in] that a layer applies, in its dtype: an adapter merged, where it has
    one."""
    if not isinstance(layer, AdaptedLinear):
        return layer.weight.detach()
    return merged(layer.weight.detach(), layer.down, layer.up, layer.scale).to(layer.weight.dtype)
