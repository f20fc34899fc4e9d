"""The dtypes of a run's forwards and frozen weights, and whether rollouts and training can share
those weights."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch

from tempflow.config import Config
from tempflow.errors import UserError
from tempflow.models import resolve_dtype
from tempflow.run.environment import uses_gpu


def engine_dtype(ds: dict) -> torch.dtype:
    """The dtype of weights and activations in training, from the `deepspeed` section."""
    if ds.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    # DeepSpeed trains in fp32 if neither section is enabled.
    return torch.float16 if ds.get("fp16", {}).get("enabled") else torch.float32


def dtypes(config: Config, device: str | None = None) -> dict[str, torch.dtype]:
    """The dtypes of the rollout's and the training's forwards, by the config key that sets each.

    Args:
        config: a checked config.
        device: "cuda" or "cpu"; None: what this machine has.
    """
    rollout = resolve_dtype(config.model.dtype, device or ("cuda" if uses_gpu() else "cpu"))
    return {"model.dtype": rollout, "the deepspeed section": engine_dtype(config.deepspeed)}


def shares_base(config: Config, device: str | None = None) -> bool:
    """Whether the rollout copy shares the training engine's frozen tensors.

    Args:
        config: a checked config.
        device: "cuda" or "cpu"; None: what this machine has.

    Raises:
        UserError: `model.share_base` or `model.quantize` asks for it, but the dtypes of rollouts
            and training differ.
    """
    if not config.may_share_base():
        return False
    found = dtypes(config, device)
    # One tensor has one dtype, so rollouts and training must agree on it.
    if len(set(found.values())) == 1:
        return True
    if config.model.share_base or config.model.quantize:
        asked = "share_base: true" if config.model.share_base else "quantize"
        named = ", ".join(
            f"{str(dtype).removeprefix('torch.')} by {key}" for key, dtype in found.items()
        )
        raise UserError(
            f"model.{asked} needs one dtype for rollouts and training, got {named}; set model.dtype"
            " to the dtype of the deepspeed section"
        )
    return False


@contextmanager
def frozen_as_loaded(module: torch.nn.Module, ds: dict) -> Iterator[None]:
    """Keep the dtype of frozen weights while a DeepSpeed engine is made around a module.

    DeepSpeed casts every weight to the dtype of training. Frozen weights that loading keeps in
    another dtype (Wan's time embedding, in float32) are restored afterwards, so that adapters are
    trained on the model that rollouts and the pipeline run.

    Args:
        module: the transformer, with its adapters.
        ds: the `deepspeed` section.
    """
    # Not at stage 3, where DeepSpeed has cut the cast weights into slices by then.
    sharded = ds.get("zero_optimization", {}).get("stage", 0) == 3
    kept = {
        p: p.data
        for p in ([] if sharded else module.parameters())
        if not p.requires_grad and p.is_floating_point() and p.dtype != engine_dtype(ds)
    }
    yield
    for parameter, value in kept.items():
        parameter.data = value.to(parameter.device)
