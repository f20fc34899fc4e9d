"""Writes checkpoints: DeepSpeed's own state for resuming, consolidated safetensors for everything
else.

    checkpoints/000040/deepspeed/   optimizer and weights, DeepSpeed's format, read back by this run
        alone
                       weights.safetensors   trained weights, whole, fp32
                       ema.safetensors   their average, once one was taken; or merge.safetensors,
                                         and snapshots.safetensors of which it is made
                       state.json   iteration, totals, config, versions
                       manifest.json   size and SHA-256 of every other file, written last
    checkpoints/latest

A checkpoint is written into a temporary folder that is renamed when complete. One without a
manifest that matches its files is never taken for whole.
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
    """Write a checkpoint of all ranks and drop the oldest beyond `keep`, but not the one with the
    highest metric `best_by`.

    state: JSON values, with "iteration". UserError where it cannot be written: then those before
    are as they were.
    """
    final = find.folder(run_dir, state["iteration"])
    draft = final.with_name(f".saving-{final.name}")
    with _failures_named(draft, run_dir):
        if distributed.rank() == 0:
            # by a start that was killed
            for left in (*final.parent.glob(".saving-*"), *final.parent.glob(".universal-*")):
                shutil.rmtree(left, ignore_errors=True)
            draft.mkdir(parents=True)
        distributed.barrier()
        universal.save_state(runtime.engine, draft / "deepspeed")
        weights = (
            (name, runtime.full_fp32(parameter)) for name, parameter in runtime.trainable.items()
        )
        write_together(draft / "weights.safetensors", runtime.trainable_shapes(), weights)
        if average and average.taken:
            average.write(draft / f"{average.key}.safetensors")
        distributed.barrier()
        if distributed.rank() == 0:
            (draft / "state.json").write_text(json.dumps(state, indent=1))
        manifest.seal(draft)
        if distributed.rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.rename(draft, final)
            write_atomic(run_dir / "checkpoints/latest", final.name + "\n")
            spared = find.best(run_dir, best_by) if best_by else None
            for old in find.folders(run_dir)[:-keep]:
                # NFS keeps a folder while another process reads a file of it; the next save tries
                # again
                if old != spared:
                    shutil.rmtree(old, ignore_errors=True)
        distributed.barrier()
    return final


@contextmanager
def _failures_named(draft: Path, run_dir: Path) -> Iterator[None]:
    """RankError for a disk that is full or cannot be written. What did not fit is removed, so that
    the run's other files find room."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = disk_is_full(error, run_dir)
        if not full and getattr(error, "errno", None) is None:
            raise
        written = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
        shutil.rmtree(draft, ignore_errors=True)
        last = find.newest(run_dir)
        then = (
            f"go on with --resume from {last.name}, which is whole"
            if last
            else "begin again with --resume: there is no earlier one"
        )
        if not full:
            raise RankError(
                f"{draft.parent}: a checkpoint cannot be written ({error}); mend that, and {then}"
            ) from None
        raise RankError(
            f"{draft.parent}: no space left for a checkpoint, of which {written / 1e6:.1f} MB were"
            f" written. Free more than that, or lower checkpoint.keep, and {then}"
        ) from None
