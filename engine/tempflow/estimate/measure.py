"""Measure forwards and backwards on the meta device: peak memory and floating point operations.

A transformer is a chain of equal blocks. To save time, `shorten` keeps three of each run of equal
ones. The middle one represents all that were removed: its operations, and what it keeps for the
backward, are multiplied by their number. The results equal those of the whole chain.

Only tensors count. What kernels allocate inside an operation (workspaces) is not seen.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate, groupby
from typing import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tempflow.compat import operator_of, storage_key
from tempflow.estimate.repeats import Repeats

# The CPU's fused attention stands for every device's: it saves the same tensors for the backward,
# and it has a rule for meta tensors. flop_registry does not know it.
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
# A module's blocks, each with the number of original blocks that it represents.
Blocks = list[tuple[torch.nn.Module, int]]


@contextmanager
def fused_attention():
    """Make scaled_dot_product_attention fused on the meta device, as it is on real devices.

    Fused attention keeps queries, keys, values, the result and row sums for the backward. The meta
    device would choose the unfused form, which keeps matrices of tokens x tokens.
    """
    # The function is replaced. A torch function mode would be simpler, but is disabled while a
    # backward runs, and gradient checkpointing runs forwards inside the backward.
    functional, plain = torch.nn.functional, torch.nn.functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _fused(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    # The CPU's operator has no grouped queries and takes masks as floats to add.
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _Kept:
    """The graph of a forward refers to one for each weight that it keeps."""


class Meter(TorchDispatchMode):
    """Counts memory and operations while it is active.

    `peak` is the most bytes of new tensors that were alive at once. `flops` are the operations of
    matrix products, convolutions and attention; attention's backward includes the scores that it
    computes again.

    Args:
        blocks: as `shorten` returns them.
    """

    def __init__(self, blocks: Blocks | tuple[()] = ()):
        super().__init__()
        self.live = self.flops = 0
        self._hooks: list = []
        self._blocks, self._run = blocks, Repeats()
        # How often an operation counts now, and whether the forward (not the backward) is running.
        self._times, self._forward = (1, True)
        # Peak of each span of time between two beginnings or ends of blocks.
        self._peaks = [0]
        # By a storage's address: its bytes, how often they count, and the span that it was made in.
        self._alive: dict[int, tuple[int, int, int]] = {}
        # By a weight's address, as long as the graph keeps the weight.
        self._kept: weakref.WeakValueDictionary[int, _Kept] = weakref.WeakValueDictionary()

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
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
        # `fresh` are the results with a storage of their own; views and results of in-place
        # operations share a storage that is counted already.
        out, fresh = self._run(func, args, kwargs)
        formula = FORMULAS.get(operator_of(func))
        if formula is not None:
            self.flops += self._times * formula(*args, **kwargs, out_val=out)
        for tensor in fresh:
            if storage_key(tensor.untyped_storage()) not in self._alive:
                self._add(tensor.untyped_storage())
        return out

    def backward_begins(self) -> None:
        """Call it between forward and backward.

        Now everything that is still alive is kept for the backward. What a block kept counts as
        often as the block, from the span after its creation on; before, nobody knew what would be
        kept. Forwards from now on are those that checkpointing repeats.
        """
        more = [0] * len(self._peaks)
        for address, (size, times, span) in self._alive.items():
            more[span] += size * (times - 1)
            self._alive[address] = size * times, 1, span
        for span, earlier in enumerate(accumulate(more[:-1], initial=0)):
            self._peaks[span] += earlier
        self._forward = False
        self._grow(sum(more))

    def keep(self, storage: torch.UntypedStorage) -> _Kept:
        """Count a weight's storage like a new one, until the result is no longer referenced."""
        if (kept := self._kept.get(storage_key(storage))) is None:
            self._kept[storage_key(storage)] = kept = _Kept()
            self._add(storage, until=kept)
        return kept

    def _add(self, storage: torch.UntypedStorage, until: object = None) -> None:
        """Count a storage until it is freed, or until another object is."""
        address, size = storage_key(storage), storage.nbytes()
        self._alive[address] = size, self._times if self._forward else 1, len(self._peaks) - 1
        self._grow(size)
        # Not at exit: finalizers of thousands of tensors would run there for nothing.
        weakref.finalize(until or storage, self._release, address).atexit = False

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
        # Gradients of a block's outputs are computed right before the block's own backward, so a
        # hook on them is the moment from which operations count as often as this block.
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._goes_back, times))

    def _goes_back(self, times: int, gradient) -> None:
        self._times = times


def shorten(module: torch.nn.Module) -> Blocks:
    """Remove all but the first, second and last block of each run of equal blocks, in place.

    First and last stay because their neighbors differ: tensors there live longer or shorter than
    between two equal blocks.

    Args:
        module: a transformer; its lists of blocks are replaced.

    Returns:
        The blocks that are left, each with the number of blocks that it represents.
    """
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
    """All outermost lists of modules, as (owner, name, list)."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield module, name, child
        else:
            yield from _chains(child)


def _description(block: torch.nn.Module) -> tuple:
    """Equal for blocks that compute and store the same. Adapters and what is trained belong to
    it."""
    return str(block), [
        (name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()
    ]


@contextmanager
def passing_gradients(module: torch.nn.Module):
    """Drop the gradient of each weight once it is computed, as the trainer does.

    DeepSpeed adds it to a buffer of its own, which `zero.Zero` counts.
    """

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


@contextmanager
def kept_weights(module: torch.nn.Module, meter: Meter):
    """Count weights that the graph of a forward keeps in memory, as if each were a new tensor.

    So it is where the weights of `module` are gathered for its forward and released after it, as
    ZeRO stage 3 does. What a linear layer saves for the backward is a view of its weight, which
    keeps the gathered copy. A weight that is saved itself is empty after its release, and filled
    again for the backward. Inside a checkpointed block nothing is saved.
    """
    own = {storage_key(p.untyped_storage()) for p in module.parameters()}

    def pack(tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        keeps = storage_key(storage) in own and not isinstance(tensor, torch.nn.Parameter)
        return tensor, meter.keep(storage) if keeps else None

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
        yield


@torch.no_grad()
def inference(run, blocks: Blocks | tuple[()] = ()) -> Meter:
    """Measure a call without gradients.

    Args:
        run: a function without arguments.
        blocks: as `shorten` returns them.
    """
    with fused_attention(), Meter(blocks) as meter:
        run()
    return meter


def training(run, module: torch.nn.Module, blocks: Blocks, gathered: bool = False) -> Meter:
    """Measure a forward of `module` and its backward, with what checkpointing computes again.

    Args:
        run: a function without arguments that returns the module's output.
        module: the trained module.
        blocks: as `shorten` returns them.
        gathered: whether weights count where the graph keeps them (`kept_weights`).
    """
    with fused_attention(), passing_gradients(module), Meter(blocks) as meter:
        with kept_weights(module, meter) if gathered else nullcontext():
            out = run()
        meter.backward_begins()
        out.backward(torch.empty_like(out))
    return meter
