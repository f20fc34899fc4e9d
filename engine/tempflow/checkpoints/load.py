"""Reads checkpoints: `restore` puts a training run back to one, with all its ranks; `load_tuned`
and `apply` give the trained weights to a policy in one process, without DeepSpeed, for evaluating,
sampling and exporting."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tempflow.checkpoints import find, manifest, universal
from tempflow.config import Config
from tempflow.errors import UserError, note
from tempflow.models import Policy
from tempflow.models.adapted import adapted
from tempflow.models.lora import LORA_DOWN, LORA_UP, merged
from tempflow.models.quantized import QuantizedLinear
from tempflow.run.directory import read_config
from tempflow.training import distributed

if TYPE_CHECKING:  # they import DeepSpeed, seconds that an evaluation need not wait
    from tempflow.training.averaged import Averaged
    from tempflow.training.engine import Runtime


def read_state(checkpoint: Path) -> dict:
    """What a run keeps in its checkpoints besides tensors: iteration, totals, config, versions."""
    return json.loads((checkpoint / "state.json").read_text())


def restore(
    runtime: Runtime, average: Averaged | None, checkpoint: Path, note=lambda text: None
) -> dict:
    """Put a run back to a checkpoint, written by any number of ranks; returns its state.

    UserError where another number's state cannot be converted: then the checkpoint is as it was.
    """
    state = read_state(checkpoint)
    ranks, written_by = distributed.world_size(), state["world_size"]
    if ranks != written_by:
        note(
            f"checkpoint {checkpoint.name} was written by {written_by} ranks and is resumed on"
            f" {ranks}"
        )
    if ranks != written_by and runtime.stage > 0:
        universal.restore(runtime.engine, checkpoint, written_by)
    elif not universal.load_state(runtime.engine, checkpoint / "deepspeed"):
        raise UserError(f"checkpoint {checkpoint}: DeepSpeed could not read it")
    if average:
        key, file = average.key, checkpoint / f"{average.key}.safetensors"
        updates = _updates(state, key)
        if updates >= average.every and not file.exists():
            raise UserError(
                f"training.{key}: checkpoint {checkpoint} holds no average; resume with {key} null"
            )
        average.read(file, updates)
    return state


@dataclass(frozen=True)
class Tuned:
    """A run's config and the trained weights of one of its checkpoints. which: "ema", "merge" or
    "raw"."""

    config: Config
    iteration: int
    which: str
    weights: dict[str, torch.Tensor]


def load_tuned(
    run_dir: Path, checkpoint: int | str | None = None, which: str | None = None
) -> Tuned:
    """Read the trained weights of a run. Raises UserError where the run, or a whole checkpoint of
    it, is missing.

    checkpoint: an iteration, "best" (by `config.best_metric()`, of those evaluated), or None for
    the newest. which: "raw", the kind of average that the run keeps ("ema" or "merge"), or None for
    the average where the run keeps one and has taken one.
    """
    config = read_config(run_dir)
    kept = config.averaging()
    if which not in (None, "raw", kept):
        raise UserError(
            f"--weights {which}: {run_dir} keeps {kept or 'no average'}; allowed"
            f" {'are ' + kept + ' and' if kept else 'is'} raw"
        )
    if checkpoint == "best":
        metric = config.best_metric()
        found = find.best(run_dir, metric)
        if found is None:
            raise UserError(
                f"--checkpoint best: no checkpoint of this run has {metric}; eval.every and"
                " checkpoint.every must meet"
            )
        checkpoint = int(found.name)
    if checkpoint is None:
        chosen = find.newest(run_dir, note=note)
        if chosen is None:
            raise UserError(f"{run_dir} has no whole checkpoint yet")
    else:
        chosen = find.folder(run_dir, checkpoint)  # type: ignore[arg-type]  # "best" and None have become a number and a name
        trouble = manifest.problem_with(chosen)
        if trouble:
            held = ", ".join(str(int(p.name)) for p in find.folders(run_dir)) or "none"
            raise UserError(f"--checkpoint {checkpoint}: {trouble}; this run has {held}")
    try:
        averaged = (
            which != "raw"
            and kept is not None
            and _average_taken(chosen, kept, getattr(config.training, kept).every)
        )
        which = kept if averaged else "raw"
        file = chosen / (f"{kept}.safetensors" if averaged else "weights.safetensors")
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{chosen} cannot be read any more ({error}); a run that trains removes its older"
            " checkpoints: try again"
        ) from None
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{file}: {len(broken)} of {len(weights)} tensors hold NaN or infinity, {broken[0]}"
            " first: the run diverged. An earlier one, or the best, may be whole: --checkpoint N,"
            " --checkpoint best"
        )
    return Tuned(config, int(chosen.name), which, weights)  # type: ignore[arg-type]  # "best" and None have become a number and a name


def _updates(state: dict, key: str) -> int:
    """Updates that an average has seen; 0 where the run kept none of this kind."""
    return state.get(f"{key}_updates", 0)


def _average_taken(checkpoint: Path, key: str, every: int) -> bool:
    """Whether a checkpoint's average is one; said where it is not, because it then holds the
    weights before training."""
    updates = _updates(read_state(checkpoint), key)
    if updates >= every:
        return True
    note(
        f"training.{key}: no average was taken in the {updates} updates until iteration"
        f" {int(checkpoint.name)} (training.{key}.every: {every}); the raw weights are used"
    )
    return False


def cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A trained weight in the dtype of its use. UserError where that cannot hold it: float16 ends
    at 65504."""
    found = weight.to(dtype)
    if not found.isfinite().all():
        narrow = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{name} holds values too large for {narrow}; use bfloat16 or float32 (--dtype of"
            " export.py, else model.dtype)"
        )
    return found


@torch.no_grad()
def apply(tuned: Tuned, policy: Policy) -> Policy:
    """Write the trained weights into the policy's denoiser, adapters merged but where it is
    quantized; returns the policy. UserError as `cast`."""
    lora = tuned.config.model.lora
    if lora is None:
        return replace_weights(policy, tuned.weights)
    for name, value in tuned.weights.items():
        if name.endswith(LORA_DOWN):
            layer = name.removesuffix(LORA_DOWN)
            up = tuned.weights[layer + LORA_UP]
            _add(policy.denoiser(), layer, value, up, lora.alpha / lora.rank)
    return policy


def _add(denoiser, name: str, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
    """Merge an adapter into its layer, or set it beside a weight that is packed."""
    layer = denoiser.get_submodule(name)
    if isinstance(layer, QuantizedLinear):
        beside = adapted(layer, len(down), scale)
        beside.down.copy_(cast(name, down, beside.down.dtype))
        beside.up.copy_(cast(name, up, beside.up.dtype))
        denoiser.set_submodule(name, beside)
    else:
        layer.weight.copy_(cast(name, merged(layer.weight, down, up, scale), layer.weight.dtype))


@torch.no_grad()
def replace_weights(policy: Policy, weights: dict[str, torch.Tensor]) -> Policy:
    """Write weights into the policy's denoiser by their names; returns the policy. UserError as
    `cast`."""
    target = dict(policy.denoiser().named_parameters())
    for name, value in weights.items():
        target[name].copy_(cast(name, value, target[name].dtype))
    return policy
