"""One process group writes a run directory: its lock, who holds it, and what a start may take
over."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_cases import small_config
from run_cases import environment

from tempflow.errors import UserError
from tempflow.run import directory
from tempflow.run import lock as run_lock

# Two processes that wait for each other before they claim; the one that holds the run says so and
# waits to be ended.
CLAIM = """
import json, os, sys
from tempflow.config import parse_config
from tempflow.errors import UserError
from tempflow.run import directory
config = parse_config(json.loads(sys.argv[1]))
root, number = config.logging.dir, config.training.seed
open(f"{root}/ready-{number}", "w").close()
while not os.path.exists(f"{root}/ready-{1 - number}"):
    pass
try:
    with directory.held(config, resume=False):
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


def configured(tmp_path, **changes):
    return small_config(logging={"dir": str(tmp_path), "name": "one"}, **changes)


def process(tmp_path, number: int) -> subprocess.Popen:
    config = configured(tmp_path, training={"seed": number}).model_dump_json()
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM, config],
        env=environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@pytest.fixture
def holder(tmp_path):
    """The process that holds the run directory, of two that were started at the same moment, and
    what the other said."""
    both = [process(tmp_path, number) for number in (0, 1)]
    said = [one.stdout.readline() for one in both]
    yield both, said
    for one in both:
        one.kill()
        one.wait()
        one.stdin.close()
        one.stdout.close()


def test_of_two_starts_one_holds_and_a_killed_one_lets_go(tmp_path, holder):
    both, said = holder
    assert sorted(text == "held\n" for text in said) == [False, True], said
    number = said.index("held\n")
    held, refused = both[number], said[1 - number]
    assert f"process {held.pid} on {socket.gethostname()}" in refused and "logging.name" in refused
    assert json.loads((tmp_path / "one/config.json").read_text())["training"]["seed"] == number, (
        "the other wrote nothing"
    )
    for resume in (False, True):
        with (
            pytest.raises(UserError, match=f"being written by process {held.pid} "),
            directory.held(configured(tmp_path), resume),
        ):
            pass
    held.send_signal(signal.SIGKILL)
    held.wait()
    with directory.held(
        configured(tmp_path, training={"seed": number}), resume=True
    ) as run_dir:  # at once, over a stale record
        assert json.loads((run_dir / ".lock").read_text())["pid"] == os.getpid()
    # a failed start is no run, though it left a lock
    with directory.held(configured(tmp_path), resume=False):
        pass


def test_reading_a_run_needs_no_lock_and_a_copy_holds_none(tmp_path):
    import shutil

    config = configured(tmp_path)
    with directory.held(config, resume=False) as run_dir:
        assert directory.read_config(run_dir) == config
        shutil.copytree(run_dir, tmp_path / "copy")
        copied = small_config(logging={"dir": str(tmp_path), "name": "copy"})
        with directory.held(copied, resume=True):
            pass
    assert (run_dir / ".lock").read_bytes() == b""


# A run whose process forks, as a data loader would. The child says whether it has a copy of the
# lock, and its end leaves the parent's lock alone. In a process of its own: a test worker can hold
# more memory than a fork may promise.
FORK = """
import json, os, sys
from tempflow.config import parse_config
from tempflow.errors import UserError
from tempflow.run import directory
config = parse_config(json.loads(sys.argv[1]))
with directory.held(config, resume=False) as run_dir:
    if (child := os.fork()) == 0:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        opened = [os.readlink(link) for link in links if os.path.exists(link)]
        print("kept" if str(run_dir / ".lock") in opened else "free", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    try:
        with directory.held(config, resume=True):
            print("held twice")
    except UserError as error:
        print(error)
"""


def test_a_child_that_outlives_its_parent_keeps_no_lock(tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", FORK, configured(tmp_path).model_dump_json()],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    child, parent = said.splitlines()
    assert child == "free" and "being written" in parent


# ----------------------------------------------------------------------- file systems without locks
@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_flock(monkeypatch, request):
    def refuse(file, how):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.0)


HERE, DEAD = socket.gethostname(), 2**22 + 1  # above the highest pid


@pytest.mark.parametrize(
    "host, pid, age, refused",
    [
        (HERE, "own", 0, True),
        (HERE, "own", 10**6, True),
        (HERE, DEAD, 0, False),
        ("elsewhere", DEAD, 0, True),
        ("elsewhere", DEAD, 10**6, False),
        (None, None, 0, False),
    ],
)
def test_without_locks_the_record_decides(tmp_path, no_flock, host, pid, age, refused):
    pid = os.getpid() if pid == "own" else pid
    lock = tmp_path / "one/.lock"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"host": host, "pid": pid, "started": "today"}) if host else "")
    os.utime(lock, (time.time() - age,) * 2)
    before = lock.read_text()
    if refused:
        with pytest.raises(UserError, match=f"process {pid} on {host}"), run_lock.lock(lock.parent):
            pass
        assert lock.read_text() == before
    else:
        with run_lock.lock(lock.parent):
            assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_without_locks_the_last_of_two_signatures_wins(tmp_path, no_flock, monkeypatch):
    other = {"host": "elsewhere", "pid": 7, "started": "now"}
    monkeypatch.setattr(
        time, "sleep", lambda seconds: (tmp_path / ".lock").write_text(json.dumps(other))
    )
    with pytest.raises(UserError, match="process 7 on elsewhere"), run_lock.lock(tmp_path):
        pass
    assert json.loads((tmp_path / ".lock").read_text()) == other


def test_without_locks_the_holder_keeps_touching_its_record(tmp_path, no_flock, monkeypatch):
    import threading

    beats = threading.Semaphore(0)
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.001)
    monkeypatch.setattr(os, "utime", lambda file: beats.release())
    with run_lock.lock(tmp_path):
        assert beats.acquire(timeout=60) and beats.acquire(timeout=60)


# -------------------------------------------------------------------------- what a start takes over
def leave(run_dir: Path, *names, rows=()):
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in names:
        place = run_dir / name
        if name.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("x")
    if rows is not None:
        (run_dir / "metrics.jsonl").write_text(
            "".join(json.dumps({"iteration": n}) + "\n" for n in rows)
        )


TAKEN = {
    "nothing": ([], None),
    "a lock": ([".lock"], None),
    "no rows": ([], []),
    "the base evaluation": (["samples/000000/samples.json"], [0]),
    "a tracker's files": (
        ["tensorboard/events.out.1", "wandb/run/log", "wandb_id.txt", "report.html"],
        [],
    ),
    "half-written files": ([".metrics.jsonl.17.tmp", "samples/.000000/0000.png"], [0]),
}
KEPT = {
    "a row": ([], [0, 1]),
    "a checkpoint": (["checkpoints/000001/state.json"], None),
    "a summary": (["summary.json"], [0]),
    "later pictures": (["samples/000010/samples.json"], [0]),
    "notes": (["notes.md"], None),
    "hidden notes": ([".notes"], None),
    "broken rows": (["metrics.jsonl/"], None),
    "a file named samples": (["samples"], None),
}


@pytest.mark.parametrize("names, rows", TAKEN.values(), ids=TAKEN)
def test_a_start_that_failed_before_training_is_taken_over(tmp_path, names, rows):
    leave(tmp_path / "one", *names, rows=rows)
    with directory.held(configured(tmp_path, training={"seed": 5}), resume=False) as run_dir:
        assert directory.read_config(run_dir).training.seed == 5


@pytest.mark.parametrize("names, rows", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("locked", [False, True], ids=["", "locked before"])
def test_what_may_be_worth_something_is_refused(tmp_path, names, rows, locked):
    leave(tmp_path / "one", *names, *([".lock"] if locked else []), rows=rows)
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(UserError, match="exists; continue it with --resume"),
        directory.held(configured(tmp_path), resume=False),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before


PLACES = {
    "a file": lambda t: (t / "runs").write_text(""),
    "a file above": lambda t: (
        (t / "file").write_text(""),
        (t / "runs").symlink_to(t / "file/runs"),
    )[0],
    "a link to nothing": lambda t: (t / "runs").symlink_to(t / "nowhere"),
    "a fifo": lambda t: os.mkfifo(t / "runs"),
    "the run is a file": lambda t: ((t / "runs").mkdir(), (t / "runs/one").write_text("")),
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("when", ["early", "late"])
def test_places_where_no_run_can_be(tmp_path, make, when):
    make(tmp_path)
    config = small_config(logging={"dir": str(tmp_path / "runs"), "name": "one"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="logging.dir, logging.name: "):
        if when == "early":
            directory.check_place(config)
        else:
            with directory.held(config, resume=False):
                pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_parent_that_only_trying_shows():
    config = small_config(logging={"dir": "/proc/nowhere/runs", "name": "one"})
    match = "logging.dir, logging.name: /proc/nowhere/runs/one cannot be"
    with pytest.raises(UserError, match=match), directory.held(config, resume=False):
        pass


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../b", "/tmp/run", "..", ".", "", " ", "a\0b", "a/.."]
)
def test_names_that_leave_the_folder(name):
    with pytest.raises(UserError, match="logging.name: expected"):
        small_config(logging={"name": name})


@pytest.mark.parametrize("name", ["a/b/c", "..a", "a..b", "ä b", "a\nb", "x" * 200])
def test_names_below_the_folder(tmp_path, name):
    with directory.held(
        small_config(logging={"dir": str(tmp_path), "name": name}), resume=False
    ) as run_dir:
        assert run_dir == tmp_path / name
