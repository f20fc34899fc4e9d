"""Saves and loads DeepSpeed's part of a checkpoint, also on another number of ranks.

ZeRO writes a file per rank, each with a slice of the weights and the optimizer state. DeepSpeed's
universal format holds them whole, by parameter, and every rank cuts its own slices out of it. It is
made when a run resumes on another number of ranks, beside the checkpoint, which is only read, and
is removed once it is loaded. Like DeepSpeed's own files it is pickle; it is only read back from
where this run wrote it.
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
from tempflow.errors import UserError, counted
from tempflow.training import distributed

TAG = "state"  # DeepSpeed's name of a checkpoint; here one folder holds one
# The conversion knows exp_avg and exp_avg_sq, which are the state of these optimizers.
CONVERTIBLE = ("adam", "adamw", "lamb")


def save_state(engine, folder: Path) -> None:
    """Write DeepSpeed's part of a checkpoint: everything that training changes (a collective)."""
    # Frozen weights are in the model's own files. save_latest would write a second file that names
    # the newest checkpoint, besides ours.
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)


def load_state(engine, folder: Path) -> bool:
    """Read back what `save_state` wrote (a collective); False if DeepSpeed could not."""
    # Strict only if nothing is frozen: frozen weights are not in the file.
    whole = all(p.requires_grad for p in engine.module.parameters())
    return engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=whole)[0] is not None


def restore(engine, checkpoint: Path, written_by: int) -> None:
    """Load a ZeRO checkpoint into a DeepSpeed engine with another number of ranks (a collective).

    While it runs it needs disk space beside the checkpoint, about twice the checkpoint's size.

    Args:
        engine: the DeepSpeed engine.
        checkpoint: the checkpoint's folder, which is not changed.
        written_by: the number of ranks that wrote it.

    Raises:
        UserError: it cannot be converted; on every rank.
    """
    folder = checkpoint.with_name(f".universal-{checkpoint.name}")
    try:
        trouble = _inconvertible(engine) or _on_rank_0(
            lambda: _convert(checkpoint / "deepspeed" / TAG, folder / TAG)
        )
        if trouble:
            raise UserError(
                f"checkpoint {checkpoint} was written by {counted(written_by, 'rank')} and could"
                f" not be converted for {distributed.world_size()}: {trouble}. Resume with"
                f" {counted(written_by, 'rank')}, or remove the cause; the checkpoint is unchanged"
            )
        _load(engine, folder)
        # Rank 0 removes the folder below, so every rank must have read it.
        distributed.barrier()
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _inconvertible(engine) -> str | None:
    """The reason why DeepSpeed's conversion would lose or miss optimizer state, or None."""
    name, params = engine.optimizer_name(), engine.optimizer_params()
    # Of an optimizer that it did not make itself, DeepSpeed names the function that did.
    if engine.client_optimizer:
        name = type(engine.basic_optimizer).__name__
    if name.lower() not in CONVERTIBLE or (params or {}).get("amsgrad"):
        return (
            f"DeepSpeed converts the state of {', '.join(CONVERTIBLE)} without amsgrad, but"
            f" deepspeed.optimizer is {name}{f' with {params}' if params else ''}"
        )
    if engine.zero_nvme_offload_optimizer():
        return "DeepSpeed does not convert optimizer state that is offloaded to NVMe"
    return None


def _on_rank_0(work) -> str | None:
    """The result of work() on rank 0, on every rank (a collective)."""
    # The work may take longer than the time limit of a collective. So it runs in a thread while all
    # ranks meet every 0.1 s in a small reduction.
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if distributed.rank() == 0 else None
        while not distributed.reduce(future is None or future.done(), "min"):
            time.sleep(0.1)
        return distributed.agree_on(future.result() if future else None)


def _convert(source: Path, target: Path) -> str | None:
    """Convert a checkpoint to the universal format; returns what went wrong, or None."""
    # Imported here: only resuming on another number of ranks needs it.
    from deepspeed.checkpoint import ds_to_universal

    # Left by a conversion that was killed.
    shutil.rmtree(target.parent, ignore_errors=True)
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        # One worker runs in this process; more would be forked from one that has threads, or CUDA.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # The conversion draws progress bars and prints each folder.
    silent = io.StringIO()
    try:
        target.mkdir(parents=True)
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            ds_to_universal.main(options)
    # Whatever DeepSpeed raises must reach the other ranks as a text, or they would wait forever.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _load(engine, folder: Path) -> None:
    with reading_universal_checkpoints(engine):
        load_state(engine, folder)
    # ZeRO-3 gives all groups of its partitions one and the same tensor as step counter. Each group
    # would then count it up, so each gets a copy.
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
