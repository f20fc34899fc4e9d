"""Run an operation on the meta device once for each set of argument shapes, strides and dtypes.

The result of an operation on meta tensors follows from those alone. Computing it runs rules in
Python, which take up to a millisecond. A transformer repeats the operations of its blocks, and
checkpointing runs them twice, so remembering results saves a fifth of a dry run's time.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

from tempflow.compat import storage_key


class Repeats:
    """Runs operations, or makes tensors like those that they returned for such arguments before."""

    def __init__(self):
        # By operation and facts of its arguments: whether the result is one tensor (not a tuple),
        # and the facts of its tensors.
        self._known: dict[tuple, tuple[bool, list[tuple]]] = {}

    def __call__(self, func, args: tuple, kwargs: dict):
        """Run `func`.

        Returns:
            Its result, and the list of the result's tensors whose storage is none of the
            arguments'.
        """
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
        # Remember only results that consist of new tensors: a view must share its storage with
        # these very arguments, and values other than tensors may depend on more than shapes.
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
    """A hashable description of a nested value, in which meta tensors are replaced by their shape,
    stride, dtype and device."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_facts, value))
    return type(value), value  # with the type, because 1 == 1.0 == True


def _made(facts: tuple) -> torch.Tensor:
    shape, stride, dtype, device = facts
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _can_be_made(tensors: list[torch.Tensor]) -> bool:
    """Whether tensors can be made again from their facts: on the meta device, each filling a
    storage of its own."""
    if not tensors or len({storage_key(tensor.untyped_storage()) for tensor in tensors}) < len(
        tensors
    ):
        return False
    return all(tensor.device.type == "meta" and _fills_storage(tensor) for tensor in tensors)


def _fills_storage(tensor: torch.Tensor) -> bool:
    # A slice is smaller than its storage, whose bytes are what counts.
    return tensor.untyped_storage().nbytes() == _made(_facts(tensor)).untyped_storage().nbytes()
