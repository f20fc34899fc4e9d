"""A checkpoint's DeepSpeed state, also on another number of ranks: by DeepSpeed's universal format,
made when a run resumes.

ZeRO writes a file per rank, each a slice of weights and optimizer state. The universal format holds
them whole, by parameter; every rank cuts its own slices out of it. It is made beside the
checkpoint, which is only read, and is gone once it is loaded. Like DeepSpeed's own files it is
pickle, read back from where this run wrote it and from nowhere else.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tempflow.compat import reading_universal_checkpoints
from tempflow.errors import UserError
from tempflow.training import distributed

TAG = "state"  # of DeepSpeed's part of a checkpoint
CONVERTIBLE = ("adam", "adamw", "lamb")  # whose state is exp_avg and exp_avg_sq


def save_state(engine, folder: Path) -> None:
    """Write DeepSpeed's part of a checkpoint: all that training changes. Frozen weights are in the
    model's own files."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)


def load_state(engine, folder: Path) -> bool:
    """Read it back; False where DeepSpeed could not."""
    whole = all(p.requires_grad for p in engine.module.parameters())
    return engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=whole)[0] is not None


def restore(engine, checkpoint: Path, written_by: int) -> None:
    """Load a ZeRO checkpoint of `written_by` ranks into a DeepSpeed engine of any other number (a
    collective).

    Takes disk space beside the checkpoint, some twice its own, while it lasts. UserError on every
    rank alike where it cannot be converted: then the checkpoint is as it was.
    """
    folder = checkpoint.with_name(f".universal-{checkpoint.name}")
    try:
        trouble = _inconvertible(engine) or _on_rank_0(
            lambda: _convert(checkpoint / "deepspeed" / TAG, folder / TAG)
        )
        if trouble:
            raise UserError(
                f"checkpoint {checkpoint} was written by {written_by} ranks and could not be"
                f" converted for {distributed.world_size()}: {trouble}. Resume with {written_by},"
                " or remove the cause; the checkpoint is unchanged"
            )
        _load(engine, folder)
        distributed.barrier()
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _inconvertible(engine) -> str | None:
    """What DeepSpeed's conversion would lose or not find."""
    name, params = engine.optimizer_name(), engine.optimizer_params() or {}
    if name.lower() not in CONVERTIBLE or params.get("amsgrad"):
        return (
            f"DeepSpeed converts the state of {', '.join(CONVERTIBLE)} without amsgrad, not of"
            f" {name} with {params}"
        )
    if engine.zero_nvme_offload_optimizer():
        return "DeepSpeed does not convert optimizer state on NVMe"
    return None


def _on_rank_0(work) -> str | None:
    """What work() on rank 0 returns, on every rank. They meet all along: it may take longer than a
    rank may wait for another."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if distributed.rank() == 0 else None
        while not distributed.reduce(future is None or future.done(), "min"):
            time.sleep(0.1)
        return distributed.agree_on(future.result() if future else None)


def _convert(source: Path, target: Path) -> str | None:
    """Returns what went wrong, or None."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target.parent, ignore_errors=True)
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    silent = io.StringIO()
    try:
        target.mkdir(parents=True)
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            ds_to_universal.main(options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _load(engine, folder: Path) -> None:
    with reading_universal_checkpoints(engine):
        load_state(engine, folder)
    # ZeRO-3 gives all groups of its partitions one step counter, which each group would then count
    # up.
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
