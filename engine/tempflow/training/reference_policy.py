"""The policy before training, which a penalty holds the trained one to, where there are no adapters
to switch off.

A frozen copy of the transformer in the dtype it is trained in: whole on each GPU, or spread over
the ranks by DeepSpeed (ZeRO stage 3 without an optimizer), there or in host memory; then its layers
are gathered as its forward reaches them.
"""

from __future__ import annotations

import copy

import deepspeed
import torch

from tempflow.config import Config
from tempflow.training.leaves import leaf_section

GATHERING = (
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "leaf_module",
)


def placement(config: Config) -> str | None:
    """Where the copy is: "whole", "sharded" or "offloaded"; None where there is none."""
    if not config.needs_reference() or config.model.lora:
        return None
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    return config.training.reference or ("sharded" if stage == 3 else "whole")


def make_reference(
    config: Config, module: torch.nn.Module, device: torch.device
) -> torch.nn.Module | None:
    """A frozen copy of a whole module, to be called as it is; None without a penalty that needs it,
    or with adapters.

    Calls of a sharded one are collectives: ranks must make as many.
    """
    where = placement(config)
    if where is None:
        return None
    frozen = copy.deepcopy(module).requires_grad_(False).eval()
    if where == "whole":
        return frozen.to(device)
    return deepspeed.initialize(
        model=frozen, config=_inference(config.deepspeed, frozen, where == "offloaded", device)
    )[0]


def _inference(ds: dict, module: torch.nn.Module, offload: bool, device: torch.device) -> dict:
    """A DeepSpeed config without an optimizer, of the training's precision and gathering."""
    zero = {
        "stage": 3,
        **{
            key: value for key, value in ds.get("zero_optimization", {}).items() if key in GATHERING
        },
    }
    zero = leaf_section(zero, module)
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    precision = {key: ds[key] for key in ("bf16", "fp16") if key in ds}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        **precision,
    }
