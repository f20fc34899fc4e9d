"""Joining the process group and claiming the run directory, with one answer for all ranks."""

from __future__ import annotations

from pathlib import Path

from tempflow import rundir
from tempflow.config import Config
from tempflow.errors import UserError
from tempflow.trainer import comm, manifest


def claim_run(config: Config, resume: bool) -> tuple[Path, Path | None]:
    """The run directory, claimed by rank 0 for all, and the checkpoint to resume from, if any.

    Raises UserError on every rank alike.
    """
    comm.init_distributed()
    trouble, found = None, None
    if comm.rank() == 0:
        try:
            run_dir = rundir.claim(config, resume)
            found = manifest.newest(run_dir, note=lambda text: print(text, flush=True)) if resume else None
        except UserError as error:
            trouble = str(error)
    trouble = comm.agree_on(trouble)
    if trouble:
        raise UserError(trouble)
    run_dir = rundir.path_of(config)
    if comm.reduce(not run_dir.is_dir(), "max"):
        raise UserError(f"logging.dir: {run_dir} is not the same folder for all ranks; it must be on a file system they share")
    return run_dir, comm.agree_on(found)
