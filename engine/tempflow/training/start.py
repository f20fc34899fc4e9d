"""Joining the process group and claiming the run directory, with one answer for all ranks."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Iterator, TypeVar

from tempflow.checkpoints import manifest
from tempflow.config import Config
from tempflow.errors import UserError
from tempflow.run import rundir
from tempflow.training import comm

T = TypeVar("T")


@contextmanager
def claim_run(config: Config, resume: bool, check: Callable[[], str | None] = lambda: None) -> Iterator[tuple[Path, Path | None]]:
    """The run directory, held by rank 0 for all while the block runs, and the checkpoint to resume from, if any.

    check: what rank 0 finds wrong with the machine, before anything is written: raises UserError, or returns a warning.
    Raises UserError on every rank alike.
    """
    comm.init_distributed()
    with ExitStack() as stack:

        def claim() -> Path | None:
            if warning := check():
                print(warning, flush=True)
            run_dir = stack.enter_context(rundir.held(config, resume))
            return manifest.newest(run_dir, note=lambda text: print(text, flush=True)) if resume else None

        found = on_first_rank(claim)
        run_dir = rundir.path_of(config)
        if comm.reduce(not run_dir.is_dir(), "max"):
            raise UserError(f"logging.dir: {run_dir} is not the same folder for all ranks; it must be on a file system they share")
        yield run_dir, comm.agree_on(found)


def on_first_rank(action: Callable[[], T]) -> T | None:
    """Do it on rank 0 and return the result there, None elsewhere; its UserError is raised on every rank."""
    trouble, result = None, None
    if comm.rank() == 0:
        try:
            result = action()
        except UserError as error:
            trouble = str(error)
    trouble = comm.agree_on(trouble)
    if trouble:
        raise UserError(trouble)
    return result
