"""The lock of a run directory: one process group at a time writes it. Held by rank 0, in the file
.lock.

It is an flock, so the kernel lets go of it when the process ends, however it ends: a run that was
killed can be resumed at once. NFS carries it to other machines. The file also names host, pid and
start of the holder, for the message that another start gets. Where the file system has no locks
(some Lustre and FUSE mounts) that record has to do: it counts while its holder lives, on another
host while the holder keeps touching it. Two starts within the same second on two hosts are then
told apart by reading the record back after a pause, which is likely but not certain to find the
other.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Iterator

from tempflow.errors import UserError

LOCK = ".lock"
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
HEARTBEAT_S, STALE_S, SETTLE_S = 15.0, 60.0, 2.0

_held: set[BinaryIO] = set()
# A child that lives on must not keep the lock of a parent that is gone; closing its copy leaves the
# parent's alone.
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a directory that exists. UserError naming the holder where there is one;
    OSError where it cannot be written."""
    with open(run_dir / LOCK, "a+b", buffering=0) as file:
        stop = _acquire(file, run_dir)
        _held.add(file)
        try:
            yield
        finally:
            stop.set()
            _held.discard(file)
            file.truncate(0)


def _acquire(file: BinaryIO, run_dir: Path) -> threading.Event:
    """Take the lock and sign it; returns what ends the heartbeat."""
    stop = threading.Event()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(run_dir, _named(file)) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _acquire_by_record(file, run_dir)
        threading.Thread(target=_beat, args=(file, stop), daemon=True).start()
    else:
        _sign(file)
    return stop


def _acquire_by_record(file: BinaryIO, run_dir: Path) -> None:
    holder, age = _read(file), time.time() - os.fstat(file.fileno()).st_mtime
    if holder and (_alive(holder) if holder["host"] == socket.gethostname() else age < STALE_S):
        raise _refusal(
            run_dir,
            holder,
            f" If that process is gone, try again {STALE_S:.0f} seconds after its end.",
        )
    mine = _sign(file)
    time.sleep(SETTLE_S)
    if (holder := _read(file)) != mine:
        raise _refusal(run_dir, holder)


def _beat(file: BinaryIO, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        try:
            os.utime(file.fileno())
        except OSError:  # tried again at the next beat
            continue


def _sign(file: BinaryIO) -> dict:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    record = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    try:
        file.truncate(0)
        file.write(json.dumps(record).encode())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # the lock holds without its record
            raise
    return record


def _read(file: BinaryIO) -> dict | None:
    file.seek(0)
    try:
        record = json.loads(file.read())
        return record if {"host", "pid", "started"} <= record.keys() else None
    except (ValueError, AttributeError):
        return None


def _named(file: BinaryIO) -> dict | None:
    """The holder of an flock; one that has only just taken it may not have signed, over the record
    of one that was killed."""
    holder = None
    for _ in range(20):
        holder = _read(file)
        if holder and (holder["host"] != socket.gethostname() or _alive(holder)):
            return holder
        time.sleep(0.05)
    return holder


def _alive(holder: dict) -> bool:
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def _refusal(run_dir: Path, holder: dict | None, more: str = "") -> UserError:
    who = (
        f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
        if holder
        else "another process"
    )
    return UserError(
        f"run directory {run_dir} is being written by {who}. Wait for it, stop it, or choose"
        f" another directory with --set logging.name=NAME.{more}"
    )
