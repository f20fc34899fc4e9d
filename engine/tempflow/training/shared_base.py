"""A rollout copy that holds adapters alone: every weight that is not trained is the training
engine's own tensor.

The adapters are applied in the copy's forward (models/adapted.py). Merging them into the shared
weights for the time of a rollout was the other way: the originals, without which the base cannot be
restored to the bit, take as much memory as the copy that is saved; merged bf16 weights round most
of a small adapter away; and a base that is quantized has no room for them. The copy has addresses
of its own for its adapters, so that an average can be evaluated in it while training's stay as they
are, and captured graphs stay valid.
"""

from __future__ import annotations

import copy

import torch

from tempflow.errors import UserError
from tempflow.models.adapted import adapted


def bare_copy(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A frozen copy of a module without adapters that shares its tensors; those that loading keeps
    in another float dtype are its own until `adopt`, because DeepSpeed casts the module's on the
    way."""
    tensors = (*module.parameters(), *module.buffers())
    shared = {id(t): t for t in tensors if t.dtype == dtype or not t.is_floating_point()}
    return copy.deepcopy(module, shared).requires_grad_(False).eval()


def adopt(
    target: torch.nn.Module, trained: torch.nn.Module, adapter: str
) -> list[tuple[str, list[str]]]:
    """Complete a `bare_copy` once the module that it was made of has its adapters and the place and
    dtype it is trained in.

    Returns for each adapter's weight of the copy the parameter of `trained` that it follows.
    UserError for an adapter of another layer than a linear one.
    """
    _bind(target, trained)
    sources = []
    for name, part in list(trained.named_modules()):
        if adapter not in getattr(part, "lora_A", ()):
            continue
        layer = target.get_submodule(name)
        if not isinstance(layer, torch.nn.Linear):
            raise UserError(
                f"model.lora.targets: {name} is a {type(layer).__name__}; only linear layers are"
                " adapted"
            )
        target.set_submodule(name, adapted(layer, part.r[adapter], part.scaling[adapter]))
        sources += [
            (f"{name}.{own}", [f"{name}.{its}.{adapter}.weight"])
            for own, its in (("down", "lora_A"), ("up", "lora_B"))
        ]
    return sources


def _bind(target: torch.nn.Module, trained: torch.nn.Module) -> None:
    """Give the copy every frozen tensor of `trained` that has its dtype: moving a module to a GPU
    makes new buffers."""
    parts = dict(target.named_modules())
    for full_name, tensor in (*trained.named_parameters(), *trained.named_buffers()):
        owner, _, name = full_name.replace(".base_layer.", ".").rpartition(".")
        mine = getattr(parts.get(owner), name, None)
        if (
            isinstance(mine, torch.Tensor)
            and mine.dtype == tensor.dtype
            and not tensor.requires_grad
        ):
            setattr(parts[owner], name, tensor)
