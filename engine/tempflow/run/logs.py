"""The record of a run, metrics.jsonl: one JSON object per iteration.

A row is on disk before the next iteration starts. The file is strict JSON: NaN and infinity become
null, which any reader accepts. Nothing here imports torch, so that reports and the dry run start
quickly.
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from pathlib import Path

from tempflow.errors import UserError, shown

METRICS_FILE = "metrics.jsonl"
# The errors of file systems that cannot flush a folder.
NO_FOLDER_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


class AppendFile:
    """A file of records, open for appending: each record is written whole, or not at all."""

    def __init__(self, path: Path):
        # Unbuffered: a buffer would keep the rest of a record that did not fit on a full disk, and
        # write it later, after `append` had reported the failure.
        self._file = open(path, "ab", buffering=0)

    def append(self, record: bytes, sync: bool = False) -> None:
        """Write a record.

        Args:
            record: its bytes.
            sync: wait until it is on the disk.

        Raises:
            OSError: where that fails; the file is then as it was.
        """
        end, left = os.fstat(self._file.fileno()).st_size, memoryview(record)
        try:
            while left:
                # An unbuffered write may take only a part, without an error.
                left = left[self._file.write(left) :]
            if sync:
                os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()


class MetricsLog:
    """The metrics file of one run, open for appending.

    A last line that a crash cut short is removed on opening, so that the next row starts on a line
    of its own. A row that cannot be written (a full disk) is kept and written with the next one.
    """

    def __init__(self, run_dir):
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mend_last_line()
        self._file, self._unwritten = AppendFile(self.path), []

    def append(self, metrics: dict) -> None:
        """Write one row and wait until it is on the disk; values are numbers, 0-d arrays or
        tensors, strings or None."""
        self._unwritten.append(_line(metrics))
        self._write()

    def replace_last(self, metrics: dict) -> None:
        """Replace the last row."""
        if self._unwritten:
            self._unwritten[-1] = _line(metrics)
            self._write()
        else:
            self._rewrite([*map(_line, read_metrics(self.path.parent)[:-1]), _line(metrics)])

    def truncate_after(self, iteration: int) -> None:
        """Drop the rows after `iteration`, from which a resumed run continues; all or nothing."""
        rows = read_metrics(self.path.parent)
        kept = [row for row in rows if row.get("iteration", 0) <= iteration]
        if len(kept) < len(rows):
            self._rewrite(list(map(_line, kept)))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _write(self) -> None:
        self._file.append("".join(self._unwritten).encode(), sync=True)
        self._unwritten.clear()

    def _rewrite(self, lines: list[str]) -> None:
        write_atomic(self.path, "".join(lines))
        self._file.close()  # the open descriptor is of the file that was replaced
        self._file = AppendFile(self.path)

    def _mend_last_line(self) -> None:
        if not self.path.exists():
            return
        whole, newline, last = self.path.read_bytes().rpartition(b"\n")
        if not last:
            return
        # A strict prefix of a JSON object is never JSON. So a last line that parses is whole, and
        # only its newline is missing.
        keep = last + b"\n" if _parse(last) is not None else b""
        write_atomic(self.path, whole + newline + keep)


def read_metrics(run_dir) -> list[dict]:
    """The rows of a run's metrics.jsonl, [] where there is none yet.

    A half-written last line, as a crash leaves it, is left out with a warning.

    Raises:
        UserError: for a bad line anywhere else; the file was then edited or damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    last = max((n for n, line in enumerate(lines) if line.strip()), default=-1)
    rows = []
    for number, line in enumerate(lines[: last + 1]):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number == last:
            warnings.warn(
                f"{path}, line {number + 1}: half-written last line left out: {shown(line)}",
                stacklevel=2,
            )
        else:
            raise UserError(f"{path}, line {number + 1} is not a JSON object: {shown(line)}")
    return rows


def write_atomic(path, content: str | bytes) -> Path:
    """Write a file so that a crash or an error leaves either the old content or the new, whole.

    Args:
        path: the file; its folder exists.
        content: text is written as UTF-8.

    Returns:
        The path.
    """
    path = Path(path)
    # In the same folder: a rename is atomic only within a file system. The process id keeps two
    # commands apart that write the same report.
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            # Before the rename: after a power failure some file systems would otherwise have the
            # new name with an empty file.
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename is on disk only with the folder
    except OSError as error:
        if error.errno not in NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(folder)
    return path


def _line(metrics: dict) -> str:
    return json.dumps(plain_row(metrics), allow_nan=False, ensure_ascii=False) + "\n"


def plain_row(metrics: dict) -> dict:
    """The row with Python numbers; NaN and infinity become None."""
    return {str(key): _plain(value) for key, value in metrics.items()}


def _plain(value):
    # By method, not type: neither numpy nor torch has to be imported for it.
    if hasattr(value, "item"):  # numpy scalar or 0-d tensor
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:  # covers bad UTF-8 as well
        return None
    return row if isinstance(row, dict) else None
