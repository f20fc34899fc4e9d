"""A rollout copy that only holds adapters; every frozen weight is the training engine's own tensor.

The adapters are applied in the copy's forward (models/adapted.py). They are not merged into the
shared weights for the time of a rollout, for three reasons: restoring the base to the bit needs the
original weights, which take as much memory as a copy; merged bf16 weights round most of a small
adapter away; and nothing can be merged into a quantized base.

The copy's adapters are tensors of their own. So an average can be evaluated in it while the
training engine's adapters stay unchanged, and captured graphs stay valid.
"""

from __future__ import annotations

import copy

import torch

from tempflow.errors import UserError
from tempflow.models.adapted import adapted


def bare_copy(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A frozen copy of a module that shares its tensors.

    Args:
        module: the transformer, before adapters are added.
        dtype: the dtype of training.
    """
    # Some weights are loaded in another float dtype. The copy has its own of these until `adopt`,
    # because DeepSpeed casts the module's while the engine is made.
    tensors = (*module.parameters(), *module.buffers())
    shared = {id(t): t for t in tensors if t.dtype == dtype or not t.is_floating_point()}
    # deepcopy takes what its memo holds instead of copying it.
    return copy.deepcopy(module, shared).requires_grad_(False).eval()


def adopt(
    target: torch.nn.Module, trained: torch.nn.Module, adapter: str
) -> list[tuple[str, list[str]]]:
    """Complete a `bare_copy`: share the tensors of the module that is trained, and add adapters.

    Args:
        target: the copy.
        trained: the module that it was made of, with its adapters, after DeepSpeed moved and cast
            its weights.
        adapter: peft's name of the adapter.

    Returns:
        (weight, parameters) pairs: each adapter weight of the copy, and the parameter of `trained`
        that it is refreshed from.

    Raises:
        UserError: a layer other than a linear one has an adapter.
    """
    _bind(target, trained)
    sources = []
    for name, part in list(trained.named_modules()):
        if adapter not in getattr(part, "lora_A", ()):
            continue
        layer = target.get_submodule(name)
        if not isinstance(layer, torch.nn.Linear):
            raise UserError(
                f"model.lora.targets: {name} is a {type(layer).__name__}; only linear layers can be"
                " adapted where rollouts share the base (model.share_base)"
            )
        target.set_submodule(name, adapted(layer, part.r[adapter], part.scaling[adapter]))
        sources += [
            (f"{name}.{own}", [f"{name}.{its}.{adapter}.weight"])
            for own, its in (("down", "lora_A"), ("up", "lora_B"))
        ]
    return sources


def _bind(target: torch.nn.Module, trained: torch.nn.Module) -> None:
    """Give the copy every frozen tensor of `trained` that has its dtype."""
    # Most are shared since `bare_copy`; not those in another dtype than that of training, nor
    # buffers, which moving a module to a GPU replaces.
    parts = dict(target.named_modules())
    for full_name, tensor in (*trained.named_parameters(), *trained.named_buffers()):
        # peft wraps an adapted layer, which is then called `base_layer`.
        owner, _, name = full_name.replace(".base_layer.", ".").rpartition(".")
        mine = getattr(parts.get(owner), name, None)
        if (
            isinstance(mine, torch.Tensor)
            and mine.dtype == tensor.dtype
            and not tensor.requires_grad
        ):
            setattr(parts[owner], name, tensor)
