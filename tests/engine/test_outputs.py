"""--out of evaluate, sample and export: nothing that the command did not make is removed, renamed
or written over."""

import errno
import os
import signal
import socket
from pathlib import Path

import pytest
from engine_cases import MODEL, config_table
from run_cases import script_here

from tempflow import cli
from tempflow.config import parse_config
from tempflow.errors import UserError
from tempflow.run import directory, outputs

SCRIPTS = ["evaluate", "sample", "export"]


@pytest.fixture
def run_dir(tmp_path):
    """A run that evaluate --base could score; sample and export would say that it has no
    checkpoint."""
    table = config_table(
        logging={"dir": str(tmp_path / "runs"), "name": "one"}, eval={"prompts": 1}
    )
    directory.claim(parse_config(table), resume=False)
    return tmp_path / "runs/one"


def everything(folder: Path) -> dict[str, tuple]:
    """Each entry below a folder with what tells a change: kind, inode, content."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            seen = path.lstat()
            found[str(path)] = (
                seen.st_mode,
                seen.st_ino,
                path.read_bytes() if path.is_file() else None,
            )
    return found


def filled(place: Path) -> Path:
    place.mkdir()
    (place / "notes.md").write_text("mine")
    return place


def bound_socket(place: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
    return place


def link(place: Path, to) -> Path:
    place.symlink_to(to)
    return place


def file(place: Path) -> Path:
    place.write_text("mine")
    return place


REFUSED = {
    "a folder with a file": lambda t: filled(t / "pictures"),
    "the same with a slash": lambda t: f"{filled(t / 'pictures')}/",
    "a folder with a hidden file": lambda t: file_in(t / "pictures", ".keep"),
    "a folder with an empty folder": lambda t: (
        (t / "pictures/empty").mkdir(parents=True) or t / "pictures"
    ),
    "a file": lambda t: file(t / "pictures"),
    "a file in the way of a parent": lambda t: file(t / "pictures") / "new",
    "a parent that cannot be made": lambda t: "/proc/nowhere/pictures",
    "a parent that cannot be written": lambda t: "/proc/pictures",
    "a link to a full folder": lambda t: link(t / "pictures", filled(t / "real")),
    "a link to nothing": lambda t: link(t / "pictures", t / "nowhere"),
    "a link to itself": lambda t: link(t / "pictures", t / "pictures"),
    "a link to a file": lambda t: link(t / "pictures", file(t / "real")),
    "a fifo": lambda t: os.mkfifo(t / "pictures") or t / "pictures",
    "a socket": lambda t: bound_socket(t / "pictures"),
    "a device": lambda t: "/dev/null",
    "the root": lambda t: "/",
    "the folder of the command": lambda t: ".",
    "nothing": lambda t: "",
    "a name too long": lambda t: t / ("x" * 300),
    "the run": lambda t: t / "runs/one",
    "the run with a slash": lambda t: f"{t / 'runs/one'}/",
    "the run through ..": lambda t: t / "runs/other/../one",
    "the run through a link": lambda t: link(t / "pictures", t / "runs/one"),
    "in the run": lambda t: t / "runs/one/pictures",
    "deep in the run": lambda t: t / "runs/one/samples/new/pictures",
    "in the run through a link": lambda t: link(t / "other", t / "runs/one") / "pictures",
    "in the run through ..": lambda t: t / "new/../runs/one/pictures",
    "above the run": lambda t: t / "runs",
}


def file_in(folder: Path, name: str) -> Path:
    folder.mkdir()
    return file(folder / name).parent


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", SCRIPTS)
def test_refused_before_anything_is_read(tmp_path, run_dir, monkeypatch, name, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".pictures").mkdir()
    (tmp_path / ".pictures.part").mkdir()
    out = str(case(tmp_path))
    before = everything(tmp_path)
    done = script_here(name, "--run", run_dir, "--out", out)
    assert (
        done.returncode == 2 and "--out" in done.stderr and "no whole checkpoint" not in done.stderr
    ), done.stderr
    assert (
        "Traceback" not in done.stderr
        and done.stdout == ""
        and len(done.stderr.splitlines()[-1]) < 1000
    )
    if "runs/one" in os.path.realpath(out) and out:
        assert "run directory" in done.stderr
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("out", ["new", "a/b/new", "empty"])
def test_a_failure_leaves_what_was(tmp_path, run_dir, name, out):
    """The prompts are missing (evaluate) or the checkpoint is: no draft stays, nor a parent made
    for it."""
    (tmp_path / "empty").mkdir()
    before = everything(tmp_path)
    more = ["--base", "--prompts", tmp_path / "none.txt"] if name == "evaluate" else []
    assert script_here(name, "--run", run_dir, "--out", tmp_path / out, *more).returncode == 2
    assert everything(tmp_path) == before


def write(draft: Path) -> None:
    (draft / "sub").mkdir()
    (draft / "sub/a.txt").write_text("a")
    (draft / "b.txt").write_text("b")


ALLOWED = {
    "new": lambda t: t / "new",
    "with a slash": lambda t: f"{t / 'new'}/",
    "parents to make": lambda t: t / "a/b/c",
    "through ..": lambda t: t / "a/../new",
    "an empty folder": lambda t: (t / "empty").mkdir() or t / "empty",
    "a link to an empty folder": lambda t: link(t / "link", (t / "empty").mkdir() or t / "empty"),
    "beside the run": lambda t: t / "runs/one-pictures",
    "a name with a line end": lambda t: t / "a b\nü",
}


@pytest.mark.parametrize("case", ALLOWED.values(), ids=ALLOWED)
def test_what_is_written(tmp_path, run_dir, case):
    out = Path(case(tmp_path))
    before = everything(tmp_path)
    with outputs.new_folder(out, run_dir) as draft:
        assert draft.is_dir() and not (out / "b.txt").exists()
        write(draft)
    out, after = Path(os.path.realpath(out)), everything(tmp_path)
    assert (out / "sub/a.txt").read_text() == "a" and sorted(os.listdir(out)) == ["b.txt", "sub"]
    assert before.items() <= after.items(), "what was there is the same file or folder still"
    assert not [name for name in after if ".tempflow" in name]
    assert out.stat().st_mode & 0o777 == (tmp_path / "runs").stat().st_mode & 0o777, (
        "as readable as any new folder"
    )


def test_an_empty_folder_of_the_command(tmp_path, run_dir, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with outputs.new_folder(Path("."), run_dir) as draft:
        write(draft)
    assert os.path.samefile(os.getcwd(), tmp_path / "here") and sorted(os.listdir()) == [
        "b.txt",
        "sub",
    ]


MEANWHILE = {
    "a full folder": lambda out: filled(out),
    "an empty folder": lambda out: out.mkdir(),
    "a file": lambda out: file(out),
    "a link to nothing": lambda out: link(out, "nowhere"),
    "a file in the empty one": lambda out: out.mkdir(exist_ok=True) or file(out / "b.txt"),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE.values(), ids=MEANWHILE)
@pytest.mark.parametrize("empty", [False, True], ids=["new", "empty"])
def test_what_appears_meanwhile_is_left_alone(tmp_path, run_dir, meanwhile, empty):
    """And the work is not lost: the message says where it lies."""
    out = tmp_path / "out"
    if empty:
        out.mkdir()
    with (
        pytest.raises(UserError, match="meanwhile") as error,
        outputs.new_folder(out, run_dir) as draft,
    ):
        write(draft)
        if empty and out.exists():
            file(out / "b.txt")
        else:
            meanwhile(out)
        before = everything(tmp_path)
    assert before.items() <= everything(tmp_path).items()
    assert str(draft) in str(error.value) and (draft / "sub/a.txt").read_text() == "a"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no space"),
        OSError(errno.EDQUOT, "quota"),
        Exception("SafetensorError: I/O error: No space left on device"),
    ],
)
def test_a_full_disk_is_named_and_cleared(tmp_path, run_dir, error):
    before = everything(tmp_path)
    with (
        pytest.raises(UserError, match="--out .*no space left"),
        outputs.new_folder(tmp_path / "a/new", run_dir) as draft,
    ):
        write(draft)
        raise error
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), KeyError("bug"), PermissionError(errno.EACCES, "elsewhere")]
)
def test_other_errors_pass_and_are_cleared_after(tmp_path, run_dir, error):
    before = everything(tmp_path)
    with pytest.raises(type(error)), outputs.new_folder(tmp_path / "new", run_dir) as draft:
        write(draft)
        raise error
    assert everything(tmp_path) == before


def test_evaluate_writes_its_pictures_and_nothing_else(tmp_path, run_dir):
    filled(tmp_path / ".pictures")
    before = everything(tmp_path)
    done = script_here(
        "evaluate", "--run", run_dir, "--base", "--num-steps", 1, "--out", tmp_path / "pictures"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "pictures")) == ["0000.png", "samples.json"]
    assert before.items() <= everything(tmp_path).items() and MODEL.is_dir()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_what_was(tmp_path, run_dir, kind):
    """A job that is ended can be started again: its own draft does not stand in its way."""
    (tmp_path / "empty").mkdir()
    before, handler = everything(tmp_path), signal.signal(kind, signal.SIG_DFL)
    try:
        cli.unwind_on_signals()
        with (
            pytest.raises(SystemExit) as end,
            outputs.new_folder(tmp_path / "empty", run_dir) as draft,
        ):
            write(draft)
            os.kill(os.getpid(), kind)
    finally:
        signal.signal(kind, handler)
    assert end.value.code == 128 + kind and everything(tmp_path) == before
