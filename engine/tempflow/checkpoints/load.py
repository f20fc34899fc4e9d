"""Reads checkpoints.

`restore` returns a training run to a checkpoint, on all ranks. `load_tuned` and `apply` give the
trained weights to a policy in one process, without DeepSpeed, for evaluating, sampling and
exporting.
"""

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
from tempflow.errors import UserError, counted, note
from tempflow.models import Policy
from tempflow.models.adapted import adapted
from tempflow.models.lora import LORA_DOWN, LORA_UP, merged
from tempflow.models.quantized import QuantizedLinear
from tempflow.run.directory import read_config
from tempflow.training import distributed

if TYPE_CHECKING:  # they import DeepSpeed, which takes seconds that an evaluation need not wait
    from tempflow.training.averaged import Averaged
    from tempflow.training.engine import Runtime


def read_state(checkpoint: Path) -> dict:
    """The part of a checkpoint that is not tensors: iteration, totals, config, versions."""
    return json.loads((checkpoint / "state.json").read_text())


def restore(
    runtime: Runtime, average: Averaged | None, checkpoint: Path, note=lambda text: None
) -> dict:
    """Return a run to a checkpoint (a collective).

    Args:
        runtime: the training engine.
        average: the average of the weights that the run keeps, if any.
        checkpoint: a whole checkpoint, written by any number of ranks.
        note: is told of what a user should know.

    Returns:
        The checkpoint's state, as of `read_state`.

    Raises:
        UserError: DeepSpeed cannot read the checkpoint, or cannot convert it to this number of
            ranks, or it has no average of the kind that the run keeps. The checkpoint is unchanged.
    """
    state = read_state(checkpoint)
    ranks, written_by = distributed.world_size(), state["world_size"]
    if ranks != written_by:
        note(
            f"checkpoint {checkpoint.name} was written by {counted(written_by, 'rank')} and is"
            f" resumed on {ranks}"
        )
    # At stage 0 every rank has all of the state, so any number of ranks reads the same files.
    if ranks != written_by and runtime.stage > 0:
        universal.restore(runtime.engine, checkpoint, written_by)
    elif not universal.load_state(runtime.engine, checkpoint / "deepspeed"):
        raise UserError(
            f"checkpoint {checkpoint}: DeepSpeed could not read {checkpoint / 'deepspeed'}; resume"
            " with the model and the deepspeed section that wrote it"
        )
    if average:
        key, file = average.key, checkpoint / f"{average.key}.safetensors"
        updates = _updates(state, key)
        # Without its file an average would silently start again from the weights of this moment.
        if updates >= average.every and not file.exists():
            raise UserError(
                f"training.{key}: checkpoint {checkpoint} holds no average ({file.name}); resume"
                f" with training.{key} null"
            )
        average.read(file, updates)
    return state


@dataclass(frozen=True)
class Tuned:
    """A run's config and the trained weights of one of its checkpoints."""

    config: Config
    iteration: int
    """The iteration of the checkpoint."""
    which: str
    """Which weights these are: "ema", "merge" or "raw"."""
    weights: dict[str, torch.Tensor]
    """fp32 by name; with LoRA the factors of the adapters alone."""


def load_tuned(
    run_dir: Path, checkpoint: int | str | None = None, which: str | None = None
) -> Tuned:
    """Read the trained weights of a run.

    Args:
        run_dir: the run directory.
        checkpoint: an iteration; "best", the one with the best `config.best_metric()` among those
            evaluated; or None, the newest.
        which: "raw"; the kind of average that the run keeps ("ema" or "merge"); or None, the
            average if the run keeps one and has taken one, otherwise "raw".

    Raises:
        UserError: the run, or a whole checkpoint of it, is missing, or its weights are not finite.
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
                f"--checkpoint best: no checkpoint of {run_dir} was evaluated with {metric}; a run"
                " needs iterations that are multiples of both eval.every and checkpoint.every"
            )
        checkpoint = int(found.name)
    if checkpoint is None:
        chosen = find.newest(run_dir, note=note)
        if chosen is None:
            raise UserError(
                f"{run_dir} has no whole checkpoint yet; one is written every checkpoint.every"
                " iterations"
            )
    else:
        chosen = find.folder(run_dir, int(checkpoint))
        trouble = manifest.problem_with(chosen)
        if trouble:
            held = ", ".join(str(int(p.name)) for p in find.folders(run_dir)) or "none"
            raise UserError(f"--checkpoint {checkpoint}: {trouble}; this run has {held}")
    try:
        # "raw" is used in place of an average that was not taken: its file would hold the weights
        # before training.
        averaged = (
            which != "raw"
            and kept is not None
            and _average_taken(chosen, kept, getattr(config.training, kept).every)
        )
        which = kept if kept and averaged else "raw"
        file = chosen / (f"{kept}.safetensors" if averaged else "weights.safetensors")
        weights = load_file(file)
    # Of a run that still trains: it may have removed this checkpoint since it was chosen above.
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{chosen} cannot be read any more ({error}); a run that trains removes its older"
            " checkpoints: try again"
        ) from None
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{file}: {len(broken)} of {len(weights)} tensors hold NaN or infinity, {broken[0]}"
            " first: the run diverged. An earlier checkpoint may be finite: --checkpoint N, or"
            " --checkpoint best"
        )
    return Tuned(config, int(chosen.name), which, weights)


def _updates(state: dict, key: str) -> int:
    """Optimizer steps that an average has followed; 0 if the run kept none of this kind."""
    return state.get(f"{key}_updates", 0)


def _average_taken(checkpoint: Path, key: str, every: int) -> bool:
    """Whether an average had been taken when a checkpoint was written; if not, a note says so."""
    updates = _updates(read_state(checkpoint), key)
    if updates >= every:
        return True
    note(
        f"training.{key}: no average was taken until iteration {int(checkpoint.name)}, in"
        f" {counted(updates, 'update')} (training.{key}.every: {every}); the raw weights are used"
    )
    return False


def cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A trained weight in another dtype. UserError where that dtype cannot hold its values."""
    # float16 ends at 65504; a larger value would become infinity without a word.
    found = weight.to(dtype)
    if not found.isfinite().all():
        narrow = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{name} holds values too large for {narrow}; use bfloat16 or float32 (--dtype of"
            " export.py, elsewhere model.dtype)"
        )
    return found


@torch.no_grad()
def apply(tuned: Tuned, policy: Policy) -> Policy:
    """Write the trained weights into the policy's denoiser and return the policy.

    Adapters are merged into their layers, or set beside them where the denoiser is quantized.

    Raises:
        UserError: as `cast`.
    """
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
    """Merge an adapter into its layer, or set it beside the layer's weight if that is packed."""
    # A packed weight cannot be written to without rounding it again.
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
    """Write weights into the policy's denoiser by name and return the policy. UserError as
    `cast`."""
    target = dict(policy.denoiser().named_parameters())
    for name, value in weights.items():
        target[name].copy_(cast(name, value, target[name].dtype))
    return policy
