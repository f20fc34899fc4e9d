"""The folder that a command writes (--out): one rule for all commands.

An existing path is refused unless it is an empty folder. Nothing is removed or renamed that the
command did not make itself. Files are written into a draft with a unique name: beside the folder,
or inside it where the folder exists and is empty, since it may be a mount point or a link. After a
failure the draft is removed, and so are the parents that were made for it. The run's own directory
is never an output.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from tempflow.errors import UserError

# Error numbers of a full disk or quota, and the free bytes below which an error without a number is
# taken for one of a full disk.
FULL, NEARLY_FULL = (errno.ENOSPC, errno.EDQUOT), 16 << 20


@contextmanager
def new_folder(out: Path, *run_dirs: Path) -> Iterator[Path]:
    """Yield a draft folder to write into; when the block ends without an error, it becomes `out`.

    Enter it before the costly work: what can be refused is refused on entering.

    Args:
        out: the folder to write; missing or empty.
        *run_dirs: run directories, in which `out` must not lie.

    Raises:
        UserError: where `out` cannot be written, where the disk is full, and where something else
            has appeared at `out` meanwhile; the finished draft is then kept and named.
    """
    with _refusals(out):
        target = _checked(out, run_dirs)
        made = _make_parents(target.parent)
        outer = _outer_draft(target, made)
    draft = outer / target.name
    try:
        with _full_disk_named(out, outer):
            draft.mkdir()
            yield draft
    except BaseException:  # Ctrl-C too leaves nothing behind
        shutil.rmtree(outer, ignore_errors=True)
        _remove_empty(made)
        raise
    try:
        _publish(target, outer, draft)
    except OSError as error:
        meanwhile = f"{error.strerror or error}; something else was written there meanwhile"
        raise UserError(
            f"--out {out}: {meanwhile}; the files of this command are in {draft}"
        ) from None


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        raise UserError(
            f"--out {out}: cannot be written: {getattr(error, 'strerror', None) or error}{where}"
        ) from None


def _checked(out: Path, run_dirs: tuple[Path, ...]) -> Path:
    """The path of `out` with links resolved; UserError unless it may be written."""
    # mkdir would make the target of the link, somewhere the user may not expect.
    if out.is_symlink() and not out.exists():
        raise UserError(
            f"--out {out} is a link to something that does not exist; name the folder itself"
        )
    # The real path: the final rename would replace a link instead of filling its folder.
    target = Path(os.path.realpath(out))
    for run_dir in run_dirs:
        inside = [
            place
            for place in (target, *target.parents)
            if place.exists() and run_dir.exists() and place.samefile(run_dir)
        ]
        if inside:
            raise UserError(
                f"--out {out} is {'' if inside[0] == target else 'inside '}the run directory"
                f" {run_dir}; choose another folder"
            )
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--out {out} exists and is not an empty folder; choose another")
    return target


def _make_parents(parent: Path) -> list[Path]:
    """Make the missing folders; returns those made, the outermost first."""
    # One by one, not makedirs: after a failure exactly these are removed again.
    missing: list[Path] = []
    while not os.path.lexists(parent):
        missing.insert(0, parent)
        parent = parent.parent
    made = []
    try:
        for place in missing:
            place.mkdir()
            made.append(place)
    except OSError:
        _remove_empty(made)
        raise
    return made


def _outer_draft(target: Path, made: list[Path]) -> Path:
    """Make a folder with a unique name on the file system of the target, where a rename is enough
    to move the draft."""
    place = target if target.exists() else target.parent
    try:
        return Path(tempfile.mkdtemp(prefix=".tempflow-", dir=place))
    except OSError as error:
        _remove_empty(made)
        error.filename = str(place)
        raise


def _remove_empty(made: list[Path]) -> None:
    for place in reversed(made):
        try:
            place.rmdir()
        except OSError:  # somebody else uses it by now
            return


def _publish(target: Path, outer: Path, draft: Path) -> None:
    """Move the draft to the target. OSError where something else has appeared there."""
    if outer.parent == target:  # an empty folder of the user's stays the same folder
        if os.listdir(target) != [outer.name]:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        for file in os.listdir(draft):
            os.rename(draft / file, target / file)
        draft.rmdir()
    else:
        target.mkdir()  # claims the name; the rename then replaces this empty folder in one step
        os.rename(draft, target)
    outer.rmdir()


def disk_is_full(error: Exception, place: Path) -> bool:
    """Whether a write failed because the disk of `place` is full."""
    # torch.save raises a RuntimeError without an error number, safetensors an error of its own
    # whose text holds the system's message.
    if isinstance(error, OSError):
        return error.errno in FULL
    unnamed = isinstance(error, RuntimeError) and shutil.disk_usage(place).free < NEARLY_FULL
    return unnamed or "No space left" in str(error)


@contextmanager
def _full_disk_named(out: Path, outer: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not disk_is_full(error, outer):
            raise
        raise UserError(f"--out {out}: no space left on the disk; nothing was kept there") from None
