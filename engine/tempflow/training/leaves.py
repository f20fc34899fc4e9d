"""Makes whole transformer blocks the units that ZeRO stage 3 gathers and releases (DeepSpeed's
"leaf modules").

By default DeepSpeed runs hooks around every module that has weights, 1 279 of them in FLUX.1, and
each hook looks ahead through the list of those that follow. A training step then waits for Python
and not for the GPU. With a block as one unit the hooks run 57 times. The weights of one block
(FLUX.1: 0.7 GB in bf16), and those fetched ahead, are in memory at a time.

DeepSpeed 0.19.8 reduces a leaf's gradients in a full backward hook. torch calls that hook when the
gradients of the module's *positional* inputs are complete. If none of these needs a gradient, it
calls the hook before any weight of the module has one, and DeepSpeed reduces zeros. diffusers calls
blocks by keyword, and under LoRA nothing before the first block is trained. So `call_by_position`
passes the arguments by position and makes one of them require a gradient. Arguments behind the last
one that requires a gradient, for example the tables of rotary embeddings, are passed by keyword,
because DeepSpeed sends every positional tensor through an autograd function of its own.

With gradient checkpointing `memory_efficient_linear` is switched off, DeepSpeed's replacement of
F.linear for the whole process. It exists so that the graph of a forward does not keep gathered
weights, but a checkpointed block keeps no graph, and each of its calls inspects Python signatures.
Without it weights outside of the blocks stay gathered until the backward (FLUX.1: 0.1 GB in bf16).

Gradient checkpointing goes inside of a leaf's hooks. diffusers checkpoints a block's whole call, so
the recomputation would run the hooks again: a second search for weights that the backward hook has
gathered already, and autograd functions in a graph that nobody follows. It is torch's reentrant
form where that is exact. The other one, which diffusers uses, calls two Python functions for each
tensor that a backward needs, 59 of them in a block of FLUX.1, and compares their shapes.
"""

from __future__ import annotations

import inspect
from functools import lru_cache, partial
from typing import Hashable, Iterable, cast

import torch
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.utils import z3_leaf_module
from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tempflow.compat import block_classes


def leaf_section(zero: dict, module: torch.nn.Module, checkpointing: bool = False) -> dict:
    """The `zero_optimization` section, at stage 3 with the module's blocks as leaves, and with
    PyTorch's own linear layers where blocks are checkpointed, unless the user's section sets these
    keys itself."""
    if zero.get("stage") != 3:
        return zero
    linear = {"memory_efficient_linear": False} if checkpointing else {}
    return {"leaf_module": {"classes": block_classes(module)}, **linear, **zero}


def graph_keeps_weights(zero: dict, checkpointing: bool) -> bool:
    """Whether the graph of a forward keeps gathered weights of linear layers, outside of
    checkpointed blocks."""
    return zero.get("stage") == 3 and not zero.get("memory_efficient_linear", not checkpointing)


def call_by_position(module: torch.nn.Module, zero: dict) -> None:
    """Prepare the leaves that a section names for DeepSpeed's backward hook.

    Must be called before DeepSpeed adds its own hooks, which must see the changed arguments.
    """
    if zero.get("stage") != 3:
        return
    for leaf in apply_zero_leaf_module_config(
        module, DeepSpeedZeroLeafModuleConfig(**(zero.get("leaf_module") or {}))
    ):
        leaf.register_forward_pre_hook(_by_position, with_kwargs=True)


def checkpoint_block(block: torch.nn.Module, *args):
    """Call a block with gradient checkpointing, for diffusers' `enable_gradient_checkpointing`.

    Args:
        block: a part of the transformer. If it is a leaf, only its `forward` is checkpointed, and
            its hooks run once; otherwise the whole call is, as in diffusers.
        args: of the call.
    """
    if not z3_leaf_module(block):
        return checkpoint(block.__call__, *args, use_reentrant=False)
    # Set for this call alone: a recomputation calls the plain `forward`, and copies of the module
    # must not hold another module's method. DeepSpeed's backward hook gathers the weights before
    # any gradient reaches the block, so they are whole when `forward` runs again.
    block.forward = partial(_recomputed, block.forward)
    try:
        return block(*args)
    finally:
        del block.forward


def _recomputed(forward, *args, **kwargs):
    """The result of a block's forward, which is computed again in the backward."""
    inside = tree_leaves(([a for a in args if not isinstance(a, torch.Tensor)], kwargs))
    # The reentrant form hands gradients to positional tensors alone, and without one of them to no
    # weight either.
    if _any_needs_gradient(args) and not _any_needs_gradient(inside):
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=True)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _any_needs_gradient(values: Iterable) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _by_position(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    kind = cast(Hashable, type(module))  # for the cache of `_signature`
    bound = _signature(kind).bind(module, *args, **kwargs)
    bound.apply_defaults()
    given = list(bound.args[1:])  # without self
    floats = [
        i
        for i, value in enumerate(given)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    # Only where none requires a gradient already. Detached first: a leaf tensor is needed, and the
    # caller's own must not change.
    needed = [i for i in floats if given[i].requires_grad]
    if torch.is_grad_enabled() and floats and not needed:
        needed = floats[:1]
        given[floats[0]] = given[floats[0]].detach().requires_grad_()
    first = max(needed, default=len(given) - 1) + 1
    names = list(bound.signature.parameters)[1 : len(given) + 1]
    behind = dict(zip(names[first:], given[first:], strict=True))
    return tuple(given[:first]), behind | bound.kwargs


@lru_cache(maxsize=16)  # the hook runs in every forward, and a model has few kinds of blocks
def _signature(kind: type[torch.nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)
