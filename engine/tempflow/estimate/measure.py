"""Forwards and backwards without data: the most they hold at once, and their floating point operations."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tempflow.estimate.families import Forward

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextmanager
def fused_attention():
    """Attention as every real device runs it: fused, keeping queries, keys, values, result and row sums for the backward.

    The meta device by itself would choose the unfused form, with its tokens x tokens matrices.
    """
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused):
        yield


def _fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def flop_counter() -> FlopCounterMode:
    """Counts matrix products, convolutions and the fused attention; a backward's attention with its recomputed scores."""
    def forward(query, key, value, *rest, **more):
        return sdpa_flop_count(query, key, value)

    def backward(grad, query, key, value, *rest, **more):
        return sdpa_backward_flop_count(grad, query, key, value)

    return FlopCounterMode(display=False, custom_mapping={ATTENTION: forward, ATTENTION_BACKWARD: backward})


class PeakBytes(TorchDispatchMode):
    """The most bytes of new tensors that were alive at once while it was active."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen and storage._cdata not in given:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, address = storage.nbytes(), storage._cdata
        self._seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size, address).atexit = False

    def _release(self, size: int, address: int) -> None:
        self.live -= size
        self._seen.discard(address)


@contextmanager
def passing_gradients(module: torch.nn.Module):
    """Weights' gradients go as they come: a trainer adds them to its own sums."""
    def drop(parameter):
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def training_flops(module: torch.nn.Module, arguments: dict) -> int:
    """Floating point operations of a forward and its backward, with what checkpointing computes again."""
    with flop_counter() as flops:
        _train(module, arguments)
    return flops.get_total_flops()


def training_peak(module: torch.nn.Module, arguments: dict) -> int:
    """The most bytes held at once in a forward and its backward."""
    with PeakBytes() as held:  # apart from the operations, because their counter keeps what checkpointing computes again
        _train(module, arguments)
    return held.peak


def _train(module: torch.nn.Module, arguments: dict) -> None:
    with fused_attention(), passing_gradients(module):
        out = module(**arguments)[0]
        out.backward(torch.empty_like(out))


def tensors(forward: Forward) -> list[torch.Tensor]:
    return [t for t in forward.arguments.values() if isinstance(t, torch.Tensor)]


@torch.no_grad()
def inference_pass(run) -> tuple[int, int]:
    """(most bytes held at once, floating point operations) of a call without gradients."""
    with fused_attention(), flop_counter() as flops, PeakBytes() as held:
        run()
    return held.peak, flops.get_total_flops()
