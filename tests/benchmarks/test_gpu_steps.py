"""gpu.py: a step that fails, hangs or dies costs nothing but itself; only a CUDA run says
"hardware"; the steps' code runs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
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
    capture,
    facts,
    families,
    hardware,
    kernel_speed,
    suites,
    trace,
)
from gpu_steps.context import Context, Skipped
from gpu_steps.report import summary

from tempflow.errors import UserError

HEAD = {
    "card": "CARD",
    "date": "2026-01-02",
    "rehearsed": False,
    "versions": {"torch": "2"},
    "minutes": 10,
}


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


# ----------------------------------------------------------------------------------------- hardware
def canned(monkeypatch, tmp_path, *options, status="ok"):
    """gpu.py with steps that prove `rollout`, on a copy of hardware.json; returns (status, the
    copy's entries by path)."""
    entries = hardware.load()
    monkeypatch.setattr(hardware, "FILE", tmp_path / "hardware.json")
    hardware.write(entries)
    monkeypatch.setattr(gpu, "uses_gpu", lambda: True)
    step = {
        "reason": None,
        "result": {"card": "CARD"},
        "proved": ["rollout"],
        "seconds": 1.0,
        "status": status,
    }
    monkeypatch.setattr(gpu, "run_step", lambda *args: step)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out.json"), *options])
    return gpu.main(), {entry["path"]: entry for entry in hardware.load()}


def test_a_run_on_a_card_makes_its_paths_hardware(monkeypatch, tmp_path):
    before = {entry["path"]: entry for entry in hardware.load()}
    status, entries = canned(monkeypatch, tmp_path)
    assert status == 0 and (entries["rollout"]["status"], entries["rollout"]["card"]) == (
        "hardware",
        "CARD",
    )
    assert entries["rollout"]["evidence"] == "gpu.py: facts" and re.fullmatch(
        r"\d{4}-\d\d-\d\d", entries["rollout"]["date"]
    )
    assert {path for path in before if before[path] != entries[path]} == {"rollout"}


def test_a_rehearsal_never_does(monkeypatch, tmp_path):
    before = {entry["path"]: entry for entry in hardware.load()}
    assert canned(monkeypatch, tmp_path, "--rehearse", status="rehearsed") == (0, before)


def test_a_failed_step_shows_in_the_exit_status(monkeypatch, tmp_path):
    assert canned(monkeypatch, tmp_path, status="failed")[0] == 1


def test_the_committed_table_is_backed():
    """Every entry's evidence is there; whatever is called hardware names its card and date; README
    shows the same."""
    for entry in hardware.load():
        assert entry["status"] in hardware.STATUSES, entry
        if entry["status"] == "hardware":
            assert (
                entry["card"]
                and entry["date"]
                and entry["evidence"].removeprefix("gpu.py: ") in BY_NAME
            ), entry
            continue
        text = (ROOT / entry["evidence"]).read_text()
        assert "def test_" in text and ("simulated" in text or entry["status"] == "unit"), entry
    spec = importlib.util.spec_from_file_location(
        "make_hardware_table", ROOT / "docs/make_hardware_table.py"
    )
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert all(file.read_text(encoding="utf-8") == text for file, text in made.files().items()), (
        "python docs/make_hardware_table.py"
    )


def test_steps_prove_paths_that_have_an_entry():
    source = "".join(file.read_text() for file in (ROOT / "benchmarks/gpu_steps").glob("*.py"))
    named = {
        name
        for call in re.findall(r"\.prove\(([^*\n]*)\)", source)
        for name in re.findall(r'"([^"]+)"', call)
    }
    named |= {name for names in suites.SHOWN.values() for name in names} | set(
        families.NAMES.values()
    )
    known = {entry["path"] for entry in hardware.load()}
    assert {"LoRA", "normal", "qwen_image"} <= named <= known
    with pytest.raises(KeyError, match="nonsense"):
        hardware.upgraded(hardware.load(), {"nonsense": "facts"}, "CARD", "2026-01-02")


# ------------------------------------------------------------------------------- parts of the steps
XML = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_noise" name="test_a[triton]" time="1.5"/>
<testcase classname="tests.kernels.test_noise" name="test_b" time="0"><skipped message="no"/></testcase>
<testcase classname="tests.kernels.test_sde_step" name="test_a" time="0"/>
<testcase classname="tests.kernels.test_sde_step" name="test_b" time="0"><failure message="far off">...</failure></testcase>
<testcase classname="tests.engine.test_gpu_runs" name="test_full_stage3" time="9"/>
<testcase classname="tests.engine.test_gpu_runs" name="test_two_gpus" time="0"><skipped message="needs two GPUs"/></testcase>
<testcase classname="tests.engine.test_graphs" name="test_c" time="0"><error message="fixture"/></testcase>
</testsuite></testsuites>"""


def test_a_path_is_shown_by_tests_that_passed_where_none_failed(tmp_path):
    file = tmp_path / "tests.xml"
    file.write_text(XML)
    found = suites.outcomes(file)
    assert [one.status for one in found] == [
        "passed",
        "skipped",
        "passed",
        "failed",
        "passed",
        "skipped",
        "failed",
    ]
    assert (
        found[3].test == "test_sde_step::test_b"
        and found[3].message == "far off"
        and found[0].seconds == 1.5
    )
    assert suites.shown(found) == ["normal", "full fine-tuning", "ZeRO-3", "checkpoint and resume"]


def test_gaps_are_where_nothing_runs():
    spans = [("a", 0, 10), ("b", 5, 10), ("a", 45, 5), ("c", 46, 1), ("c", 60, 40)]  # microseconds
    seen = trace.busy_and_gaps(
        [{"name": name, "ts": start, "dur": length} for name, start, length in spans]
    )
    assert (
        seen["busy"] == pytest.approx(0.6)
        and seen["s"] == pytest.approx(100e-6)
        and seen["kernels"] == 5
    )
    assert seen["gaps over 20 us"] == 1 and seen["largest gap, ms"] == pytest.approx(0.03)
    assert [one["name"] for one in seen["top"]] == ["c", "a", "b"]
    with pytest.raises(AssertionError, match="saw nothing"):
        trace.busy_and_gaps([])


def test_the_page_has_a_line_for_every_step():
    steps = [
        {
            "name": "facts",
            "status": "ok",
            "reason": None,
            "seconds": 9.0,
            "result": {"headline": "a | b"},
            "proved": [],
        },
        {
            "name": "kernels",
            "status": "failed",
            "reason": "SystemExit: sde: differs",
            "seconds": 3.0,
            "proved": [],
            "result": {"table": [{"op": "ode", "us": 1.23456}, {"op": "sde", "share": None}]},
        },
    ]
    page = summary(HEAD, steps)
    assert "# CARD, 2026-01-02" in page and "| facts | ok | 9 | a \\| b |" in page
    assert (
        "| kernels | failed | 3 | " + BY_NAME["kernels"].about + "; SystemExit: sde: differs |"
        in page
    )
    assert (
        "| op | us | share |" in page
        and "| ode | 1.235 |  |" in page
        and len(page.splitlines()) < 60
    )
    assert "Rehearsal" in summary(HEAD | {"rehearsed": True}, steps).splitlines()[0]


# ------------------------------------------ what asks torch.cuda, on a torch.cuda that is not there
ON_CUDA = Namespace(device=Namespace(type="cuda"))


def stand_in(monkeypatch, **functions):
    for name, function in functions.items():
        monkeypatch.setattr(f"torch.cuda.{name}", function, raising=False)


def test_a_peak_is_what_was_allocated_on_top(monkeypatch):
    marks = []
    stand_in(
        monkeypatch,
        synchronize=lambda: None,
        memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 350,
        reset_peak_memory_stats=lambda: marks.append("reset"),
    )
    assert Context.peak_of(ON_CUDA, lambda: marks.append("ran") or 7) == (7, 250) and marks == [
        "reset",
        "ran",
    ]


def test_host_waits_are_the_warnings_of_waiting(monkeypatch):
    modes = []
    stand_in(monkeypatch, set_sync_debug_mode=modes.append)
    with families.host_waits(ON_CUDA) as waits:
        warnings.warn(
            "Synchronization debug mode does not yet detect all synchronizing operations",
            UserWarning,
            stacklevel=1,
        )
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
    assert len(waits) == 3 and modes == ["warn", "default"]


def test_the_cards_facts(monkeypatch):
    stand_in(
        monkeypatch,
        get_device_properties=lambda index: Namespace(
            total_memory=80, multi_processor_count=132, L2_cache_size=50
        ),
        device_count=lambda: 1,
        get_device_capability=lambda: (9, 0),
        mem_get_info=lambda: (79, 80),
    )
    monkeypatch.setattr(facts, "nvidia_driver", lambda: "580.1")
    found = facts._card()
    assert (
        found["properties"]["clock_rate"] == "missing"
        and found["properties"]["total_memory"] == 80
        and found["driver"] == "580.1"
    )


def test_what_a_failed_capture_breaks_is_written_down(monkeypatch, tmp_path):
    """A torch.cuda whose failed capture leaves its stream and breaks the next empty_cache, as
    torch's does."""
    state = {"stream": "main", "spoiled": False}

    class Graph:
        def __init__(self, graph):
            pass

        def __enter__(self):
            if state["spoiled"]:
                raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

        def __exit__(self, *error):
            state.update(stream="side", spoiled=True)
            raise RuntimeError("operation failed due to a previous error during capture\nmore")

    def empty_cache():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    stand_in(
        monkeypatch,
        graph=Graph,
        CUDAGraph=object,
        current_stream=lambda: state["stream"],
        synchronize=lambda: None,
        set_stream=lambda stream: state.update(stream=stream),
        empty_cache=empty_cache,
    )
    context, found = Context(tmp_path / "f.json", rehearse=True), {}
    capture._spoil(context, found)
    assert found["error"] == "RuntimeError: operation failed due to a previous error during capture"
    assert found["stream_restored"] is False and state["stream"] == "main"
    assert {what: how[:12] for what, how in found["afterwards"].items()} == {
        "synchronize": "ok",
        "a matrix product": "ok",
        "empty_cache": "RuntimeError",
        "another capture": "RuntimeError",
    }
    assert json.loads((tmp_path / "f.json").read_text())["result"]["torch"] == found


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


# --------------------------------------------------------------------------------------- kernels.py
def test_a_card_without_a_clock_rate_has_no_floor(monkeypatch):
    """CUDA 13 has taken the field away."""
    benchmark = kernel_speed.load_benchmark()
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: Namespace(multi_processor_count=132)
    )
    assert benchmark.noise_floor(1000, "fp32", "cuda") is None
    monkeypatch.setattr(
        "torch.cuda.get_device_properties",
        lambda device: Namespace(multi_processor_count=132, clock_rate=1980000),
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(benchmark, "noise_instructions", lambda dtype, capability: 38)
    assert benchmark.noise_floor(10**9, "fp32", "cuda") == pytest.approx(
        38e9 / (132 * 128 * 1.98e9)
    )


def test_a_case_that_disagrees_keeps_the_rows_before_it(monkeypatch):
    benchmark, kept = kernel_speed.load_benchmark(), []

    def measure(name, *rest):
        if name == "loss":
            raise SystemExit("loss: differs")
        return {"op": name}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda *args: 1e9)
    arguments = benchmark.parse_arguments(False, ["--rows", "1"])
    with pytest.raises(SystemExit):
        benchmark.run(
            arguments, torch.device("cpu"), lambda report: kept.append(list(report["rows"]))
        )
    assert [row["op"] for row in kept[-1]] == ["ode", "sde", "sde"]
