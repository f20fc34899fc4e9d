"""What fails beside the training is told of once, leaves nothing half-written, and is tried
again."""

import errno
import json
import os
import resource
import sys
import types
from contextlib import contextmanager

import pytest

from tempflow.errors import UserError
from tempflow.run import logs, trackers
from tempflow.run.byproducts import ByProducts
from tempflow.run.logs import AppendFile, MetricsLog, read_metrics, write_atomic
from tempflow.run.trackers import Trackers

FULL = OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def files_at_most(size):
    """The kernel writes no file beyond `size` bytes meanwhile, as on a disk that is full: the last
    write is cut short."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_attempts_are_told_of_once_by_name(capsys):
    attempt = ByProducts().attempt
    assert attempt("one", lambda x: x + 1, 1) == 2
    for _ in range(3):
        assert attempt("one", int, "x") is None and attempt("two", [].pop) is None
    assert attempt("one", int, "7") == 7, "and tried again"
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2
        and lines[0].startswith("warning: one failed (ValueError: ")
        and lines[1].startswith("warning: two failed")
    )


def test_an_end_is_no_failure():
    for end in (KeyboardInterrupt, SystemExit):
        with pytest.raises(end):
            ByProducts().attempt("one", lambda end=end: (_ for _ in ()).throw(end()))


@pytest.mark.parametrize("room", [0, 1, 7, 15])
def test_a_record_is_written_whole_or_not_at_all(tmp_path, room):
    file = AppendFile(tmp_path / "file")
    file.append(b"whole\n")
    with files_at_most(6 + room), pytest.raises(OSError):
        file.append(b"does not fit 16b\n")
    assert (tmp_path / "file").read_bytes() == b"whole\n"
    file.append(b"again\n")
    assert (tmp_path / "file").read_bytes() == b"whole\nagain\n"


def test_rows_that_found_no_room_are_written_with_the_next(tmp_path):
    log = MetricsLog(tmp_path)
    log.append({"iteration": 0})
    size = log.path.stat().st_size
    for iteration in (1, 2):
        with files_at_most(size + 9), pytest.raises(OSError):
            log.append({"iteration": iteration})
        assert read_metrics(tmp_path) == [{"iteration": 0}]
    with files_at_most(size + 9), pytest.raises(OSError):
        log.replace_last({"iteration": 2, "final": True})
    log.append({"iteration": 3})
    assert read_metrics(tmp_path) == [
        {"iteration": 0},
        {"iteration": 1},
        {"iteration": 2, "final": True},
        {"iteration": 3},
    ]
    log.replace_last({"iteration": 3, "final": True})
    log.append({"iteration": 4})
    assert [row.get("final") for row in read_metrics(tmp_path)] == [None, None, True, True, None]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("fault", ["room", "fsync", "replace"])
def test_a_failed_atomic_write_leaves_nothing(tmp_path, monkeypatch, fault):
    write_atomic(tmp_path / "file", "old")
    if fault != "room":
        monkeypatch.setattr(os, fault, lambda *a: (_ for _ in ()).throw(FULL))
    with files_at_most(4), pytest.raises(OSError):
        write_atomic(tmp_path / "file", "new, and longer" if fault == "room" else "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch, code):
    """As on some network and bucket file systems; the file itself is on the disk."""
    flush = os.fsync

    def fsync(descriptor):
        if os.path.isdir(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(logs.os, "fsync", fsync)
    assert write_atomic(tmp_path / "file", "new").read_text() == "new"


# ----------------------------------------------------------------------------------------- trackers
def test_events_on_a_full_disk(tmp_path, capsys):
    """One line, no traceback of a thread; what is written once there is room can be read, and what
    was there before."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = Trackers(tmp_path, tensorboard=True)
    board.begin(after=-1)
    board.log({"iteration": 1, "loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    for room in (0, 5, 20):
        with files_at_most(file.stat().st_size + room):
            board.log({"iteration": 2, "loss": 0.25})
    board.log({"iteration": 3, "loss": 0.125})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (3, 0.125)]
    said = capsys.readouterr().err
    assert (
        said.count("warning: logging.tensorboard failed") == 1
        and "Traceback" not in said
        and len(said.splitlines()) == 1
    )


def test_events_of_an_earlier_attempt_are_hidden(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for attempt, (after, steps) in enumerate([(-1, range(5)), (2, (3, 4)), (-1, (0,))]):
        monkeypatch.setattr(trackers.time, "time", lambda attempt=attempt: 1e9 + 100 * attempt)
        with Trackers(tmp_path, tensorboard=True) as board:
            board.begin(after)
            for step in steps:
                board.log({"iteration": step, "attempt": attempt})
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        seen = [(event.step, event.value) for event in events.Scalars("attempt")]
        assert (
            seen
            == [[(n, 0) for n in range(5)], [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)], [(0, 2)]][
                attempt
            ]
        )


def test_a_start_that_fails_leaves_no_events(tmp_path):
    Trackers(tmp_path, tensorboard=True).close()
    assert os.listdir(tmp_path) == []


class UsageError(Exception):
    pass


@pytest.mark.parametrize(
    "error, words",
    [
        (
            UsageError("api_key not configured (no-tty).\ncall wandb.login(key=[your_api_key])"),
            "api_key not configured .no-tty.. call",
        ),
        (
            TypeError("init() got an unexpected keyword argument 'projct'"),
            "unexpected keyword argument 'projct'",
        ),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_wandb_that_cannot_start(tmp_path, monkeypatch, error, words):
    def init(**options):
        raise error

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=f"^logging.wandb: .*{words}") as raised:
        Trackers(tmp_path, wandb={"projct": "p"}, tensorboard=True)
    assert "\n" not in str(raised.value)


def test_wandb_that_is_lost_on_the_way(run_factory, monkeypatch, capsys):
    def lost(*a, **k):
        raise ConnectionError("gone")

    run = types.SimpleNamespace(log=lost, define_metric=lambda *a, **k: None, finish=lost)
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: run, Image=lost)
    )
    run_dir = run_factory("demo", iterations=2, sets=(0,))
    with Trackers(run_dir, wandb={}, tensorboard=True) as both:
        both.begin(-1)
        for row in read_metrics(run_dir):
            both.log(row)
        both.samples(run_dir / "samples/000000")
    assert capsys.readouterr().err.count("warning: ") == 1
    assert json.loads((run_dir / "config.json").read_text()) and list(
        (run_dir / "tensorboard").iterdir()
    )
