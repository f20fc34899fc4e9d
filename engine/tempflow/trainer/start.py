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
    chosen = comm.agree_on(str(found) if found else None)
    return rundir.path_of(config), Path(chosen) if chosen else None
