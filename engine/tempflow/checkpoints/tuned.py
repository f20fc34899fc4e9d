"""A run's tuned policy, on one process and without DeepSpeed: for evaluating, sampling and exporting."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tempflow.arguments import path
from tempflow.checkpoints import manifest
from tempflow.config import Config
from tempflow.errors import UserError, note, shown
from tempflow.models import Policy, load_policy
from tempflow.run.directory import read_config
from tempflow.run.environment import check_gpu, describe, uses_gpu

LORA_DOWN, LORA_UP = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Tuned:
    """A run's config and the trained weights of one of its checkpoints. which: "ema" or "raw"."""

    config: Config
    iteration: int
    which: str
    weights: dict[str, torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose a checkpoint: --run, --checkpoint, --weights."""
    parser.add_argument("--run", type=path, required=True, help="run directory")
    parser.add_argument("--checkpoint", type=_checkpoint, metavar="N|best",
                        help="an iteration, or the best as checkpoint.keep_best says (default: the newest whole one)")  # fmt: skip
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="the average where the run keeps one")


def _checkpoint(text: str) -> int | str:
    if text == "best":
        return text
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"expected an iteration or best, got {shown(text)}")
    return int(text)


def load_tuned(run_dir: Path, checkpoint: int | str | None = None, which: str = "ema") -> Tuned:
    """Read the trained weights of a run. Raises UserError where the run, or a whole checkpoint of it, is missing.

    checkpoint: an iteration, "best" (by `config.best_metric()`, of those evaluated), or None for the newest.
    """
    config = read_config(run_dir)
    if checkpoint == "best":
        metric = config.best_metric()
        found = manifest.best(run_dir, metric)
        if found is None:
            raise UserError(f"--checkpoint best: no checkpoint of this run has {metric}; eval.every and checkpoint.every must meet")
        checkpoint = int(found.name)
    if checkpoint is None:
        chosen = manifest.newest(run_dir, note=note)
        if chosen is None:
            raise UserError(f"{run_dir} has no whole checkpoint yet")
    else:
        chosen = manifest.folder(run_dir, checkpoint)
        trouble = manifest.fault(chosen)
        if trouble:
            held = ", ".join(str(int(p.name)) for p in manifest.folders(run_dir)) or "none"
            raise UserError(f"--checkpoint {checkpoint}: {trouble}; this run has {held}")
    try:
        averaged = which == "ema" and config.training.ema is not None and _average_taken(chosen, config.training.ema.every)
        which = "ema" if averaged else "raw"
        file = chosen / ("ema.safetensors" if averaged else "weights.safetensors")
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{chosen} cannot be read any more ({error}); a run that trains removes its older checkpoints: try again") from None
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{file}: {len(broken)} of {len(weights)} tensors hold NaN or infinity, {broken[0]} first: the run diverged. "
                        "An earlier one, or the best, may be whole: --checkpoint N, --checkpoint best")  # fmt: skip
    return Tuned(config, int(chosen.name), which, weights)


def _average_taken(checkpoint: Path, every: int) -> bool:
    """Whether a checkpoint's average is one; said where it is not, because it then holds the weights before training."""
    updates = json.loads((checkpoint / "state.json").read_text())["ema_updates"]
    if updates >= every:
        return True
    note(f"training.ema: no average was taken in the {updates} updates until iteration {int(checkpoint.name)} (training.ema.every: "
         f"{every}); the raw weights are used")  # fmt: skip
    return False


def device() -> str:
    """The GPU where there is one, said on stderr; UserError where it cannot be used."""
    check_gpu()
    print(describe(), file=sys.stderr, flush=True)
    return "cuda" if uses_gpu() else "cpu"


def base_policy(config: Config, dtype: str | None = None) -> Policy:
    """The run's policy before training, text encoders and all."""
    return load_policy(config.model.path, dtype=dtype or config.model.dtype, device=device(),
                       max_sequence_length=config.model.max_sequence_length)  # fmt: skip


def cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A trained weight in the dtype of its use. UserError where that cannot hold it: float16 ends at 65504."""
    found = weight.to(dtype)
    if not found.isfinite().all():
        narrow = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} holds values too large for {narrow}; use bfloat16 or float32 (--dtype of export.py, else model.dtype)")
    return found


@torch.no_grad()
def apply(tuned: Tuned, policy: Policy) -> Policy:
    """Write the trained weights into the policy's denoiser, adapters merged; returns the policy. UserError as `cast`."""
    target = dict(policy.denoiser().named_parameters())
    lora = tuned.config.model.lora
    for name, value in tuned.weights.items():
        if lora is None:
            target[name].copy_(cast(name, value, target[name].dtype))
        elif name.endswith(LORA_DOWN):
            layer = name.removesuffix(LORA_DOWN)
            weight = target[f"{layer}.weight"]
            delta = tuned.weights[layer + LORA_UP] @ value * (lora.alpha / lora.rank)
            weight.copy_(cast(layer, weight.float() + delta.to(weight.device), weight.dtype))
    return policy
