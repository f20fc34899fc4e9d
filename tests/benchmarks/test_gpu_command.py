"""gpu.py: the time is shared out among steps, and a step that fails, hangs or dies costs nothing
but itself."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace

import gpu
import psutil
import pytest
import torch
from engine_cases import ROOT
from gpu_steps import (
    BY_NAME,
    STEPS,
    Step,
    hardware,
)
from gpu_steps.context import Context, Skipped
from report_head import HEAD

from tempflow.errors import UserError

# --------------------------------------------------------------------------------------------- plan
ABC = [Step(name, seconds, "", "") for name, seconds in (("a", 10), ("b", 20), ("c", 30))]


@pytest.mark.parametrize(
    "seconds, shares",
    [
        (60, {"a": 10, "b": 20, "c": 30}),
        (120, {"a": 20, "b": 40, "c": 60}),
        (59, {"a": 10, "b": 20}),
        (5, {"a": 10}),
    ],
)
def test_the_last_steps_are_dropped_and_all_get_more_of_a_long_time(seconds, shares):
    assert gpu.plan(ABC, seconds) == shares


def test_the_default_takes_all_steps():
    assert (
        list(gpu.plan(list(STEPS), 60 * gpu.MINUTES))
        == list(BY_NAME)
        == [step.name for step in STEPS]
    )
    for step in STEPS:
        assert callable(step.load()), step.name


def test_what_a_step_leaves_goes_to_the_next(monkeypatch):
    """The second step may take its own share and the rest of the first one's, never the third
    one's."""
    limits, clock = {}, [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])

    def run_step(step, rehearse, limit):
        limits[step.name] = limit
        clock[0] += 4 if step.name == "a" else limit
        return {
            "status": "ok",
            "reason": None,
            "result": {"card": "C"},
            "proved": [],
            "seconds": 1.0,
        }

    monkeypatch.setattr(gpu, "run_step", run_step)
    monkeypatch.setattr(gpu, "_identify", lambda *args: None)
    gpu.run_steps(ABC, Namespace(minutes=1, rehearse=False, out=None), gpu.Report(**HEAD))
    assert limits == {"a": 10, "b": 26, "c": 30}


# ----------------------------------------------------------------------------------- one step's end
FOUND = json.dumps({"status": "running", "reason": None, "result": {"n": 1}, "proved": ["rollout"]})


def ends(monkeypatch, script, limit=60.0):
    monkeypatch.setattr(
        gpu, "command", lambda step, file, rehearse: ["sh", "-c", script, "sh", str(file), FOUND]
    )
    return gpu.run_step(ABC[0], False, limit)


def test_a_step_that_is_killed_leaves_what_it_found(monkeypatch):
    done = ends(monkeypatch, 'echo said; echo "$2" > "$1"; kill -9 $$')
    assert (done["status"], done["reason"]) == (
        "failed",
        "its process ended without a result (killed by SIGKILL)",
    )
    assert (
        done["result"] == {"n": 1} and done["proved"] == ["rollout"] and done["output"] == "said\n"
    )


def test_a_step_that_finds_nothing_before_it_ends_is_no_success(monkeypatch):
    done = ends(monkeypatch, "exit 3")
    assert done["status"] == "failed" and "exit status 3" in done["reason"] and done["result"] == {}


def test_a_step_that_hangs_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    done = ends(monkeypatch, f'echo "$2" > "$1"; sleep 1000 & echo $! > {pid}; wait', limit=3.0)
    assert (done["status"], done["reason"]) == ("timed out", "ended after 3 s") and done[
        "result"
    ] == {"n": 1}
    left = int(pid.read_text())
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


def raising(error):
    def step(context):
        context.note(n=1)
        raise error

    return step


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (Skipped("needs two GPUs"), "skipped", "needs two GPUs"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "out of memory",
            "CUDA out of memory. Tried",
        ),
        (ValueError("no"), "failed", "ValueError: no"),
        (
            SystemExit("sde: differs from the PyTorch chain"),
            "failed",
            "SystemExit: sde: differs from the PyTorch chain",
        ),
    ],
)
def test_how_a_step_ended_is_written_beside_what_it_found(tmp_path, error, status, reason):
    Context(tmp_path / "f.json", rehearse=False).run(raising(error))
    written = json.loads((tmp_path / "f.json").read_text())
    assert (written["status"], written["reason"], written["result"]) == (status, reason, {"n": 1})


# ------------------------------------------------------------------------------------------ command
@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--only", "facts", "nonsense"],
            "--only: no step is named nonsense; there are facts, families",
        ),
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        ([], "no CUDA GPU is usable here; --rehearse"),
    ],
)
def test_refusals(monkeypatch, options, words):
    monkeypatch.setattr(gpu, "uses_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(UserError, match=re.escape(words)):
        gpu.main()


@pytest.mark.slow
def test_a_rehearsal_as_a_command(tmp_path):
    """Two steps in processes of their own. Hugging Face's `kernels`, where there is one, is not
    this folder's kernels.py."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("")
    before, out = hardware.FILE.read_bytes(), tmp_path / "report.json"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [*filter(None, [os.environ.get("PYTHONPATH")]), str(tmp_path)]
        )
    }
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--rehearse",
        "--minutes",
        "30",
        "--only",
        "capture",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert [(step["name"], step["status"], step["proved"]) for step in report["steps"]] == [
        ("facts", "rehearsed", []),
        ("capture", "rehearsed", []),
    ]
    assert report["rehearsed"] is True and report["steps"][0]["result"]["kernels_package"] == str(
        tmp_path / "kernels/__init__.py"
    )
    assert report["steps"][1]["result"]["torch"] == {"rehearsed": "no capture without a GPU"}
    assert (
        "Rehearsal" in out.with_suffix(".md").read_text() and hardware.FILE.read_bytes() == before
    )


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "forwards", "training"])
def test_a_steps_code_runs(tmp_path, name):
    """On a CPU at tiny sizes, in this process."""
    context = Context(tmp_path / "found.json", rehearse=True)
    BY_NAME[name].load()(context)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["result"]["table"] and found["result"]["headline"] and not found["proved"]
