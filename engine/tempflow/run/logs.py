"""The record of a run, metrics.jsonl: one JSON object per iteration, on disk before the next
iteration starts, and strict JSON (NaN and infinity become null). Nothing here imports torch."""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from pathlib import Path

from tempflow.errors import UserError, shown

METRICS_FILE = "metrics.jsonl"
# what file systems say that cannot flush a folder
NO_FOLDER_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


class AppendFile:
    """A file of records, open for appending: each is written whole, or not at all."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)

    def append(self, record: bytes, sync: bool = False) -> None:
        """Write a record; sync: wait until it is on the disk. OSError where that fails: then the
        file is as it was."""
        end, left = os.fstat(self._file.fileno()).st_size, memoryview(record)
        try:
            while left:
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

    A last line that a crash cut short is removed on opening, so that the next row starts a line of
    its own. A row that cannot be written (a full disk) is kept and written with the next one.
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
        """Put another row in the place of the last one."""
        if self._unwritten:
            self._unwritten[-1] = _line(metrics)
            self._write()
        else:
            self._rewrite([*map(_line, read_metrics(self.path.parent)[:-1]), _line(metrics)])

    def truncate_after(self, iteration: int) -> None:
        """Drop the rows past `iteration`, at which a resumed run takes up again; all or nothing."""
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
        self._file.close()
        self._file = AppendFile(self.path)

    def _mend_last_line(self) -> None:
        if not self.path.exists():
            return
        whole, newline, last = self.path.read_bytes().rpartition(b"\n")
        if not last:
            return
        # A strict prefix of a one-line JSON object is never JSON: what parses is whole and lacks
        # only its newline.
        keep = last + b"\n" if _parse(last) is not None else b""
        write_atomic(self.path, whole + newline + keep)


def read_metrics(run_dir) -> list[dict]:
    """The rows of a run's metrics.jsonl, [] where there is none yet.

    A half-written last line, which a crash leaves, is left out with a warning that names it; a bad
    line anywhere else is a UserError.
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
    """Replace a file by `content` so that a crash leaves either the old one or the new one, whole;
    so does an error."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    except OSError as error:
        if error.errno not in NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(folder)
    return path


def _line(metrics: dict) -> str:
    return json.dumps(plain_row(metrics), allow_nan=False, ensure_ascii=False) + "\n"


def plain_row(metrics: dict) -> dict:
    return {str(key): _plain(value) for key, value in metrics.items()}


def _plain(value):
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
