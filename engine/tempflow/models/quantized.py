"""Frozen linear layers whose weights are packed into 4 or 8 bits (`model.quantize`), and converting
a transformer to such layers.

bitsandbytes' operators pack and unpack: NF4 for 4 bits, 256 even steps for 8 bits, each with an
fp32 scale for every 64 weights. The forward unpacks the weight into the dtype of its input and
multiplies like torch.nn.Linear; the backward unpacks it again. The library's own layers are not
used: its 4-bit layer uses another kernel when no gradient is needed, so velocities in rollouts and
in training would differ, and its 8-bit layer rounds the activations, too.

Packed weights are buffers of whole numbers, which a cast of the module does not touch. They are not
saved, because they follow from the checkpoint that was loaded. bitsandbytes is imported when the
first weight is packed, so a dry run does not need it.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tempflow.errors import UserError
from tempflow.models.layers import token_layers

# Weights that share a scale. In 8 bits, rounding changes normally distributed weights by 0.63 %, in
# blocks of 256 by 0.73 %. With NF4 it is 9.2 %. Measurements: docs/log.md.
BLOCK = 64
KINDS = ("8bit", "4bit")


class QuantizedLinear(torch.nn.Linear):
    """A layer with the packed weight of `source`; it shares the bias.

    Args:
        source: the layer whose weight [out, in] is packed.
        kind: "8bit" or "4bit".
        device: where the weight is packed, and stays.
    """

    weight: torch.Tensor
    """uint8: [out, in] for 8 bits, [ceil(out x in / 2), 1] for 4 bits."""
    scales: torch.Tensor
    """fp32 [ceil(out x in / 64)], viewed as int32 so that casts of the module leave it alone."""
    table: torch.Tensor
    """fp32 [256], the values that the bytes of 8 bits stand for, viewed as int32; None for 4
    bits."""
    dtype: torch.dtype
    """Dtype of the weight before it was packed."""

    def __init__(self, source: torch.nn.Linear, kind: str, device: torch.device | str):
        packed, scales, table = _pack(source.weight.detach().to(device), kind)
        self._hold(source, kind, source.weight.dtype, packed, scales, table)

    def _share(self, source: QuantizedLinear) -> None:
        """Become a layer with another one's tensors."""
        self._hold(source, source.kind, source.dtype, source.weight, source.scales, source.table)

    def _hold(self, source: torch.nn.Linear, kind: str, dtype: torch.dtype, weight, scales, table):
        # torch.nn.Linear's constructor would allocate a full weight.
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.kind, self.dtype = kind, dtype
        # Not persistent: checkpoints must load whatever `model.quantize` says.
        for name, tensor in (("weight", weight), ("scales", scales), ("table", table)):
            self.register_buffer(name, tensor, persistent=False)
        self.register_parameter("bias", source.bias)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] as a new tensor, up to the rounding of the packing."""
        shape, scales = (self.out_features, self.in_features), self.scales.view(torch.float32)
        if self.weight.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        library = torch.ops.bitsandbytes
        if self.kind == "4bit":
            return library.dequantize_4bit(self.weight, scales, BLOCK, "nf4", shape, dtype)
        table = self.table.view(torch.float32)
        return library.dequantize_blockwise(self.weight, scales, table, BLOCK, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]; returns [..., out]."""
        # The same product either way, so rollouts and training have the same bits.
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return F.linear(x, self.unpacked(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """A layer's product, with a gradient of its input only. It saves no tensor for the backward;
    autograd's own product would keep the unpacked weight of every layer."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


def check_library(quantize: str | None) -> None:
    """Raise a UserError if `model.quantize` needs bitsandbytes and it cannot be imported."""
    if quantize is not None:
        _library()


@torch.no_grad()
def quantize_layers(
    transformer: torch.nn.Module, quantize: str | None, device: torch.device | str
) -> torch.nn.Module:
    """Replace a transformer's large layers (`token_layers`) by packed ones.

    Layers are packed one by one, so the device never holds more than one unpacked weight.

    Args:
        transformer: changed in place.
        quantize: "8bit", "4bit", or None, which changes nothing.
        device: where packed layers are placed; the other layers stay where they are.

    Returns:
        The same transformer.

    Raises:
        UserError: bitsandbytes cannot be imported.
    """
    if quantize is not None:
        for name, layer in token_layers(transformer).items():
            transformer.set_submodule(name, QuantizedLinear(layer, quantize, device))
    return transformer


def _pack(
    weight: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The packed weight, scales and table of a `QuantizedLinear`, for a weight [out, in]."""
    if weight.is_meta:
        return _shapes(weight, kind)
    library = _library()
    weight = weight.contiguous()  # the operators pack the memory as it lies
    if kind == "4bit":
        packed, state = library.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        return packed, state.absmax.view(torch.int32), None
    # Even steps: with the library's default table, which is made for optimizer states, rounding
    # changes weights by 0.97 % instead of 0.63 %.
    table = _even_steps().to(weight.device)
    packed, state = library.quantize_blockwise(weight, code=table, blocksize=BLOCK)
    return packed, state.absmax.view(torch.int32), table.view(torch.int32)


def _even_steps() -> torch.Tensor:
    """The 256 values of a byte, fp32: -1 to 1 in 254 even steps, with 0 twice."""
    # bitsandbytes' own `create_linear_map` computes them in torch's default dtype, which need not
    # be fp32.
    values = torch.linspace(-1, 1, 255, dtype=torch.float32, device="cpu")
    return torch.cat([values[:127], values.new_zeros(1), values[127:]])


def _shapes(weight: torch.Tensor, kind: str):
    """What `_pack` returns, without values, on the meta device."""
    count, eight = weight.numel(), kind == "8bit"
    packed = weight.shape if eight else (-(-count // 2), 1)
    return (
        weight.new_empty(packed, dtype=torch.uint8),
        weight.new_empty(-(-count // BLOCK), dtype=torch.int32),
        weight.new_empty(256, dtype=torch.int32) if eight else None,
    )


def _library():
    try:
        from bitsandbytes import functional
    except Exception as error:  # also OSError and others of a library built for another machine
        raise UserError(
            f"model.quantize: needs the package bitsandbytes, which cannot be imported"
            f" ({' '.join(str(error).split()):.200}); run pip install 'bitsandbytes>=0.50' (the"
            " extra quantize), or set it to null"
        ) from None
    return functional
