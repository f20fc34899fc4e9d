"""A frozen copy of the policy before training, from which a penalty measures. With LoRA no copy is
needed, because switching the adapters off gives the same.

The copy has the dtype of training. It is whole on each GPU, or DeepSpeed spreads it over the ranks
(ZeRO stage 3 without an optimizer), on the GPUs or in host memory, and gathers each layer when the
forward reaches it.
"""

from __future__ import annotations

import copy

import deepspeed
import torch

from tempflow.config import Config
from tempflow.training.leaves import leaf_section

# Keys of `zero_optimization` that say how weights are gathered; those about gradients and optimizer
# state are left out, because the copy has neither.
GATHERING = (
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "leaf_module",
    "memory_efficient_linear",
)


def placement(config: Config) -> str | None:
    """The placement of the copy: "whole", "sharded" or "offloaded"; None if there is no copy."""
    if not config.needs_reference() or config.model.lora:
        return None
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    # At stage 3 the trained weights do not fit on one GPU, so a whole copy would not either.
    return config.training.reference or ("sharded" if stage == 3 else "whole")


def make_reference(
    config: Config, module: torch.nn.Module, device: torch.device
) -> torch.nn.Module | None:
    """A frozen copy of a module, which is called like it. None without a penalty that needs it, or
    with LoRA.

    Calls of a sharded copy are collectives: all ranks must make equally many.

    Args:
        config: a checked config.
        module: the transformer, before DeepSpeed cuts its weights into slices.
        device: where a whole copy is put.
    """
    where = placement(config)
    if where is None:
        return None
    frozen = copy.deepcopy(module).requires_grad_(False).eval()
    if where == "whole":
        return frozen.to(device)
    return deepspeed.initialize(
        model=frozen, config=_inference(config, frozen, where == "offloaded", device)
    )[0]


def _inference(
    config: Config, module: torch.nn.Module, offload: bool, device: torch.device
) -> dict:
    """A DeepSpeed config without an optimizer, with the precision and gathering of training."""
    ds = config.deepspeed
    zero = {
        "stage": 3,
        **{
            key: value for key, value in ds.get("zero_optimization", {}).items() if key in GATHERING
        },
    }
    # of the training's too: DeepSpeed replaces F.linear for the whole process
    zero = leaf_section(zero, module, config.model.gradient_checkpointing)
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    precision = {key: ds[key] for key in ("bf16", "fp16") if key in ds}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        **precision,
    }
