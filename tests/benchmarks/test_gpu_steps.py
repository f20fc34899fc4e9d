"""The steps of gpu.py: what they read off tests, traces and torch.cuda, and what their page says."""

import json
import warnings
from argparse import Namespace

import pytest
import torch
from gpu_steps import (
    BY_NAME,
    capture,
    facts,
    families,
    kernel_speed,
    suites,
    trace,
)
from gpu_steps.context import Context
from gpu_steps.report import summary
from report_head import HEAD

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
