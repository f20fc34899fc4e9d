"""Standard output that breaks never ends a command: it is told of once on stderr."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console as RichConsole
from rich.progress import Progress

from tempflow.errors import UserError
from tempflow.run.console import Console
from tempflow.run.streams import Steady, check_result

ENGINE = Path(__file__).parents[2] / "engine"


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


def closed_file():
    stream = open(os.devnull, "w")
    stream.close()
    return stream


BROKEN = {
    "a closed pipe": closed_pipe,
    "a full disk": lambda: open("/dev/full", "w", buffering=1),
    "a closed file": closed_file,
}
broken = pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)


@broken
@pytest.mark.parametrize("terminal", [False, True])
def test_the_console_goes_on(make, terminal, capsys, tmp_path):
    stream = Steady(make(), "standard output")
    console = Console(4, output=RichConsole(file=stream, force_terminal=terminal))
    with console:
        for iteration in range(5):
            with console.phase("rollout", 2) as advance:
                advance()
            console.iteration({"iteration": iteration, "eval/reward": 0.5})
        console.note("a line " * 9)
        console.summary({"minutes": 1.0}, tmp_path)
    with Progress(console=RichConsole(file=stream, force_terminal=terminal)) as progress:
        assert list(progress.track(range(3))) == [0, 1, 2]
    print("print", file=stream, flush=True)
    said = capsys.readouterr()
    assert (
        said.err.count("warning: standard output cannot be written") == 1
        and len(said.err.splitlines()) == 1
    ), said.err
    assert said.out == ""


@broken
def test_a_result_that_is_lost_is_an_error(make, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Steady(io.StringIO(), "standard output"))
    print("a result", flush=True)
    check_result()
    monkeypatch.setattr(sys, "stdout", Steady(make(), "standard output"))
    print("a result", flush=True)
    with pytest.raises(UserError, match="result could not be written"):
        check_result()


def test_letters_that_an_encoding_lacks():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    print('prompt "Müller 你"', file=Steady(out, "standard output"), flush=True)
    assert out.buffer.getvalue() == b'prompt "M\\xfcller \\u4f60"\n'


def test_a_disk_that_has_room_again_is_written_again(capsys):
    out, full = io.StringIO(), [True, True, False]
    written = out.write

    def write(text):
        if full.pop(0):
            raise OSError(28, "No space left on device")
        return written(text)

    out.write = write
    stream = Steady(out, "standard output")
    for text in "abc":
        stream.write(text)
    assert out.getvalue() == "c" and capsys.readouterr().err.count("No space left on device") == 1


def test_what_is_whole_passes_unchanged():
    out = io.StringIO()
    stream = Steady(out, "standard output")
    stream.writelines(["a\n", "ü\n"])
    assert (
        out.getvalue() == "a\nü\n" and not stream.isatty() and stream.getvalue() == out.getvalue()
    )


CODE = """
import sys
from tempflow import cli
def main():
    for n in range(2000):
        print("line", n)
    if len(sys.argv) > 1:
        raise cli.UserError("refused")
    descriptor = open(sys.executable, "rb").fileno()
    print("done", descriptor, file=sys.stderr)
cli.run(main)
"""


@pytest.mark.parametrize("how", ["| head -1 > /dev/null", "> /dev/full", ">&-", "<&- >&-"])
@pytest.mark.parametrize("refuses", [False, True])
def test_the_end_of_a_command(how, refuses):
    """Its status and its messages are what they would be; files it opens are not taken for the
    closed stream."""
    command = f'"$0" -c "$1" {"refuse" if refuses else ""} {how}; exit ${{PIPESTATUS[0]}}'
    env = {**os.environ, "PYTHONPATH": str(ENGINE)}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, CODE], capture_output=True, text=True, env=env
    )
    assert done.returncode == (2 if refuses else 0), done.stderr
    # before or after what the command says at its end, as the reader's end is seen
    warnings = [line for line in done.stderr.splitlines() if "warning: standard output" in line]
    assert len(warnings) == (">&-" not in how)
    (last,) = [line for line in done.stderr.splitlines() if line not in warnings]
    assert last.startswith("error: refused" if refuses else "done "), done.stderr
    assert refuses or int(last.split()[1]) > 2
