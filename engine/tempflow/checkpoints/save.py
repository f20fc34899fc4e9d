"""Writes checkpoints: DeepSpeed's own state for resuming, and whole safetensors files for all other
purposes.

    checkpoints/000040/deepspeed/            optimizer and weights in DeepSpeed's format; only this
                                             run reads them back
                       weights.safetensors   trained weights, whole, fp32
                       ema.safetensors       their average, once one was taken; or merge.safetensors
                                             and the snapshots.safetensors that it is made of
                       state.json            iteration, totals, config, versions
                       manifest.json         size and SHA-256 of every other file, written last
    checkpoints/latest

A checkpoint is written into a temporary folder, which is renamed when it is complete. A checkpoint
whose manifest does not match its files does not count as whole.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from tempflow.checkpoints import find, manifest, universal
from tempflow.checkpoints.safetensors_writer import write_together
from tempflow.errors import RankError, UserError
from tempflow.run.logs import write_atomic
from tempflow.run.outputs import disk_is_full
from tempflow.training import distributed
from tempflow.training.averaged import Averaged
from tempflow.training.engine import Runtime


def save_checkpoint(
    runtime: Runtime,
    average: Averaged | None,
    run_dir: Path,
    state: dict,
    keep: int,
    best_by: str | None = None,
) -> Path:
    """Write a checkpoint and remove the oldest ones (a collective).

    Args:
        runtime: the training engine.
        average: the average of the weights that the run keeps, if any.
        run_dir: the run directory.
        state: JSON values, with "iteration".
        keep: number of checkpoints that stay.
        best_by: the checkpoint with the highest value of this metric stays in addition.

    Returns:
        The checkpoint's folder.

    Raises:
        RankError: it cannot be written; earlier checkpoints are unchanged.
    """
    final = find.folder(run_dir, state["iteration"])
    draft = final.with_name(f".saving-{final.name}")
    with _failures_named(draft, run_dir):
        if distributed.rank() == 0:
            # Drafts of an earlier process that was killed while it wrote them.
            for left in (*final.parent.glob(".saving-*"), *final.parent.glob(".universal-*")):
                shutil.rmtree(left, ignore_errors=True)
            draft.mkdir(parents=True)
        # No rank may write before rank 0 has removed what a killed process left of this draft.
        distributed.barrier()
        universal.save_state(runtime.engine, draft / "deepspeed")
        # A generator: one whole weight at a time is gathered, so no rank holds the full model.
        weights = (
            (name, runtime.full_fp32(parameter)) for name, parameter in runtime.trainable.items()
        )
        write_together(draft / "weights.safetensors", runtime.trainable_shapes(), weights)
        # Before the first average there is only a copy of the weights before training.
        if average and average.taken:
            average.write(draft / f"{average.key}.safetensors")
        distributed.barrier()
        if distributed.rank() == 0:
            (draft / "state.json").write_text(json.dumps(state, indent=1))
        manifest.seal(draft)
        # From here on the draft is whole, and a rename of a folder is atomic. After a crash between
        # the two lines the checkpoint of this iteration is missing, but the ones before it stay.
        if distributed.rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.rename(draft, final)
            write_atomic(run_dir / "checkpoints/latest", final.name + "\n")
            spared = find.best(run_dir, best_by) if best_by else None
            for old in find.folders(run_dir)[:-keep]:
                # Errors are ignored: NFS keeps a folder while another process reads one of its
                # files, and the next save tries again.
                if old != spared:
                    shutil.rmtree(old, ignore_errors=True)
        distributed.barrier()
    return final


@contextmanager
def _failures_named(draft: Path, run_dir: Path) -> Iterator[None]:
    """Turn the errors of a disk that is full or cannot be written into a RankError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # torch and safetensors report a full disk as errors without an errno: the disk is asked.
        full = disk_is_full(error, run_dir)
        # Without an errno it is a mistake in the code, which needs its traceback.
        if not full and getattr(error, "errno", None) is None:
            raise
        written = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
        # Removed at once, so that metrics, report and log of the run have room to say why it ended.
        shutil.rmtree(draft, ignore_errors=True)
        last = find.newest(run_dir)
        then = (
            f"continue with --resume from {last.name}, which is whole"
            if last
            else "start again with --resume; there is no earlier checkpoint"
        )
        if not full:
            raise RankError(
                f"{draft.parent}: a checkpoint cannot be written ({error}); fix that, then {then}"
            ) from None
        raise RankError(
            f"{draft.parent}: no space left for a checkpoint, of which {written / 1e6:.1f} MB were"
            f" written. Free more than that, or lower checkpoint.keep, then {then}"
        ) from None
