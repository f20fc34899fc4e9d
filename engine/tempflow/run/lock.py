"""The lock of a run directory, so that one run at a time writes into it. Rank 0 holds it, on the
file .lock.

The lock is an flock. The kernel releases it when the process ends, in whatever way, so a killed run
can be resumed at once; NFS makes it visible to other machines. The file also records host, pid and
start of the holder, for the message that a second start gets.

Some file systems have no locks (Lustre and FUSE mounts without the option). There the record alone
decides: it is valid while its holder lives, or, if the holder is on another host, while the holder
keeps updating the file's time. If two hosts start within the same second, each reads the record
back after a pause; that usually, but not certainly, detects the other.
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
# Seconds. Four heartbeats may be missed, by a slow file server, before a record is stale.
HEARTBEAT_S, STALE_S, SETTLE_S = 15.0, 60.0, 2.0

_held: set[BinaryIO] = set()
# An flock belongs to the open file, which a forked child shares. A reward worker that outlives its
# killed parent would keep the lock; closing the child's copy does not release the parent's.
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of an existing directory while the block runs.

    Raises:
        UserError: where another process holds it; the message names that process.
        OSError: where the file cannot be written.
    """
    # "a": opening must not truncate the record of a holder. Unbuffered: others read it at once.
    with open(run_dir / LOCK, "a+b", buffering=0) as file:
        stop = _acquire(file, run_dir)
        _held.add(file)
        try:
            yield
        finally:
            stop.set()
            _held.discard(file)
            # Emptied, not removed: another start may have the file open and would then hold the
            # lock of a file that no later start can find.
            file.truncate(0)


def _acquire(file: BinaryIO, run_dir: Path) -> threading.Event:
    """Take the lock and write the record; setting the returned event ends the heartbeat."""
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
    # Of two starts that both found no holder, the one that wrote last keeps the lock.
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
        # On a full disk the flock holds all the same; only the message to others lacks the holder.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
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
    """The record of the process that holds the flock, None where it cannot be read."""
    # Between taking the lock and writing its record, a holder leaves the record of an earlier run
    # that was killed. A record whose process is dead is therefore read again for up to a second.
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
    except OSError:  # it lives, but belongs to another user
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
