"""Only a run of gpu.py on a card calls a path of the engine "hardware", and the committed table is
backed by what it names."""

import importlib.util
import re
import sys

import gpu
import pytest
from engine_cases import ROOT
from gpu_steps import (
    BY_NAME,
    families,
    hardware,
    suites,
)


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
