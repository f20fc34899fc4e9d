"""Operations on the meta device, run once for arguments of the same shapes, strides and dtypes.

What a meta tensor is made of follows from those alone, and the rules that say how are Python, a
millisecond for many an operation. A transformer's blocks repeat all of theirs, and checkpointing
runs them twice.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

from tempflow.compat import storage_key


class Repeats:
    """Runs operations, or makes what they returned for such arguments before."""

    def __init__(self):
        self._known: dict[
            tuple, tuple[bool, list[tuple]]
        ] = {}  # by an operation and its arguments: is it one tensor, and its tensors

    def __call__(self, func, args: tuple, kwargs: dict):
        """The result of `func`, and those of its tensors that own a storage which the arguments do
        not have."""
        key = func, _facts(args), _facts(tuple(kwargs.items()))
        if key in self._known:
            single, facts = self._known[key]
            made = [_made(each) for each in facts]
            return made[0] if single else tuple(made), made
        out = func(*args, **kwargs)
        tensors = _tensors(out)
        given = {storage_key(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        fresh = [tensor for tensor in tensors if storage_key(tensor.untyped_storage()) not in given]
        single = isinstance(out, torch.Tensor)
        if (single or type(out) is tuple and len(out) == len(fresh)) and _can_be_made(fresh):
            self._known[key] = single, [_facts(tensor) for tensor in fresh]
        return out, fresh


def _tensors(value) -> list[torch.Tensor]:
    return (
        [value]
        if isinstance(value, torch.Tensor)
        else [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    )


def _facts(value) -> tuple:
    """What a meta tensor is made of, for each in a nested value; what else there is stands for
    itself."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_facts, value))
    return type(value), value


def _made(facts: tuple) -> torch.Tensor:
    shape, stride, dtype, device = facts
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _can_be_made(tensors: list[torch.Tensor]) -> bool:
    """Whether they are on the meta device and fill a storage each, so that others like them are
    made of their facts."""
    if not tensors or len({storage_key(tensor.untyped_storage()) for tensor in tensors}) < len(
        tensors
    ):
        return False
    return all(tensor.device.type == "meta" and _fills_storage(tensor) for tensor in tensors)


def _fills_storage(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == _made(_facts(tensor)).untyped_storage().nbytes()
