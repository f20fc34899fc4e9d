"""Forwards and backwards on the meta device: the most bytes that they hold at once, and their
floating point operations.

A transformer is a chain of equal blocks. `shorten` leaves three of each run of them, the middle one
to stand for all that are gone: what it does counts that many times, and so does what it leaves for
the backward. The numbers are those of the whole chain.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, groupby
from typing import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tempflow.compat import operator_of, storage_key
from tempflow.estimate.repeats import Repeats

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FORMULAS = flop_registry | {
    ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    ATTENTION_BACKWARD: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(
        grad.shape, query.shape, key.shape, value.shape
    ),
}
# a module's blocks, each with the number of blocks that it stands for
Blocks = list[tuple[torch.nn.Module, int]]


@contextmanager
def fused_attention():
    """Attention as every real device runs it: fused, keeping queries, keys, values, result and row
    sums for the backward.

    The meta device by itself would choose the unfused form, with its tokens x tokens matrices. A
    mode of torch functions would not do in its place: it is off while a backward runs, and
    checkpointing's forwards with it.
    """
    functional, plain = torch.nn.functional, torch.nn.functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _fused(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class Meter(TorchDispatchMode):
    """While it is active: the most bytes of new tensors that were alive at once (`peak`), and
    operations (`flops`): those of matrix products, convolutions and attention, with the scores that
    attention's backward computes again.

    blocks: as `shorten` returns them.
    """

    def __init__(self, blocks: Blocks | tuple[()] = ()):
        super().__init__()
        self.live = self.flops = 0
        self._hooks: list = []
        self._blocks, self._run = blocks, Repeats()
        # how often an operation counts; whether the first forward is under way
        self._times, self._forward = (1, True)
        self._peaks = [0]  # of each span between two blocks' beginnings and ends
        self._alive: dict[
            int, tuple[int, int, int]
        ] = {}  # by a storage's address its bytes, how often they count, and its span

    @property
    def peak(self) -> int:
        return max(self._peaks)

    def __enter__(self):
        for block, times in self._blocks:
            self._hooks += [
                block.register_forward_pre_hook(partial(self._begin, times)),
                block.register_forward_hook(partial(self._end, times)),
            ]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # views and results in place lie in storages that the caller brought
        out, fresh = self._run(func, args, kwargs)
        formula = FORMULAS.get(operator_of(func))
        if formula is not None:
            self.flops += self._times * formula(*args, **kwargs, out_val=out)
        for tensor in fresh:
            if storage_key(tensor.untyped_storage()) not in self._alive:
                self._add(tensor.untyped_storage())
        return out

    def backward_begins(self) -> None:
        """From now on what a block left counts as often as the block; so it did in the spans after
        it. A block's forward is one that checkpointing runs again."""
        more = [0] * len(self._peaks)
        for address, (size, times, span) in self._alive.items():
            more[span] += size * (times - 1)
            self._alive[address] = size * times, 1, span
        for span, earlier in enumerate(accumulate(more[:-1], initial=0)):
            self._peaks[span] += earlier
        self._forward = False
        self._grow(sum(more))

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage_key(storage), storage.nbytes()
        self._alive[address] = size, self._times if self._forward else 1, len(self._peaks) - 1
        self._grow(size)
        weakref.finalize(storage, self._release, address).atexit = False

    def _grow(self, size: int) -> None:
        self.live += size
        self._peaks[-1] = max(self._peaks[-1], self.live)

    def _release(self, address: int) -> None:
        self.live -= self._alive.pop(address)[0]

    def _begin(self, times: int, *_) -> None:
        if self._forward:
            self._times = times
            self._peaks.append(self.live)

    def _end(self, times: int, block, given, out) -> None:
        if not self._forward:
            return
        self._times = 1
        self._peaks.append(self.live)
        # autograd comes back to them before the block's own operations, and in order
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._goes_back, times))

    def _goes_back(self, times: int, gradient) -> None:
        self._times = times


def shorten(module: torch.nn.Module) -> Blocks:
    """Leave the first, the second and the last block of each run of equal ones in place."""
    kept: Blocks = []
    for owner, name, blocks in list(_chains(module)):
        runs = [list(run) for _, run in groupby(blocks, _description)]
        chosen: Blocks = []
        for run in runs:
            chosen += (
                [(b, 1) for b in run]
                if len(run) <= 3
                else [(run[0], 1), (run[1], len(run) - 2), (run[-1], 1)]
            )
        setattr(owner, name, torch.nn.ModuleList(block for block, _ in chosen))
        kept += chosen
    return kept


def _chains(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.ModuleList]]:
    """The lists of modules that lie in no other one."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield module, name, child
        else:
            yield from _chains(child)


def _description(block: torch.nn.Module) -> tuple:
    return str(block), [
        (name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()
    ]


@contextmanager
def passing_gradients(module: torch.nn.Module):
    """Weights' gradients go as they come: a trainer adds them to its own sums."""

    def drop(parameter):
        parameter.grad = None

    handles = [
        p.register_post_accumulate_grad_hook(drop) for p in module.parameters() if p.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inference(run, blocks: Blocks | tuple[()] = ()) -> Meter:
    """What a call without gradients holds and computes."""
    with fused_attention(), Meter(blocks) as meter:
        run()
    return meter


def training(run, module: torch.nn.Module, blocks: Blocks) -> Meter:
    """What a call of `module` and its backward hold and compute, with what checkpointing computes
    again."""
    with fused_attention(), passing_gradients(module), Meter(blocks) as meter:
        out = run()
        meter.backward_begins()
        out.backward(torch.empty_like(out))
    return meter
