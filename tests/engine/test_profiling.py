"""What a profiler sees of a run: the real NVTX calls, recorded by a small injected tool
(nvtx_recorder.c)."""

import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from engine_cases import HERE
from run_cases import environment, train

from tempflow.errors import UserError
from tempflow.profiling import Profile


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is a requirement of the project"
    library = tmp_path_factory.mktemp("nvtx") / "recorder.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, HERE / "nvtx_recorder.c"], check=True
    )
    return library


def ranges(record) -> list[tuple[str, ...]]:
    """Every range as the messages of those around it and its own; checks that all are closed and in
    the one domain."""
    stack, seen = [], []
    for line in record.read_text().splitlines():
        kind, domain, *message = line.split("\t")
        if domain != "tempflow":
            continue
        if kind == "push":
            stack.append(message[0])
            seen.append(tuple(stack))
        else:
            stack.pop()
    assert not stack
    return seen


@pytest.mark.slow
def test_every_stage_of_a_run_has_its_range(recorder, tmp_path, monkeypatch):
    record = tmp_path / "record.txt"
    monkeypatch.setenv("NVTX_INJECTION64_PATH", str(recorder))
    monkeypatch.setenv("NVTX_RECORD", str(record))
    # a lane's ranges stand in its own thread, not inside the rollout's
    run = train(
        tmp_path,
        "profiled",
        "--profile",
        "1:2",
        training={"iterations": 2, "updates": {"passes": 2}},
        eval={"every": 0},
        rollout={"lanes": 1},
    )
    seen = ranges(record)
    stages = Counter(
        tuple(re.sub(r"( \w+=\S+)+$", "", message) for message in path) for path in seen
    )
    assert stages["iteration",] == 2 and ("iteration number=1",) in seen
    assert (
        stages["iteration", "rollout"]
        == stages["iteration", "reward"]
        == stages["iteration", "weight sync"]
        == 2
    )
    assert stages["iteration", "optimizer step"] == 4
    assert stages["iteration", "train micro-batch"] == 4 * 2, (
        "12 decisions in micro-batches of 8, 2 updates, 2 iterations"
    )
    assert stages["iteration", "rollout", "decode"] >= 2 and stages["checkpoint",] == 1
    rows = sum(
        int(re.search(r"rows=(\d+) steps=(\d+)-(\d+)", path[-1])[1])
        for path in seen
        if path[-1].startswith("forward")
    )
    assert rows == sum(row["forwards/rollout"] for row in run.rows if row["iteration"] > 0)
    assert stages["iteration", "rollout", "forward"] == sum(
        path[-1].startswith("forward") for path in seen
    )


def test_ranges_close_when_what_they_name_fails(recorder, tmp_path, monkeypatch):
    code = (
        "from tempflow.profiling import span\ntry:\n  with span('a', n=1):\n    with span('b'): 1 /"
        " 0\nexcept ZeroDivisionError: pass"
    )
    monkeypatch.setenv("NVTX_INJECTION64_PATH", str(recorder))
    monkeypatch.setenv("NVTX_RECORD", str(tmp_path / "record.txt"))
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
    assert ranges(tmp_path / "record.txt") == [("a n=1",), ("a n=1", "b")]


@pytest.mark.parametrize("text", ["", "3", "3:3", "4:2", "-1:2", "a:b", "1:2:3", ":"])
def test_profile_refuses(text):
    with pytest.raises(UserError, match="START:STOP"):
        Profile(text)


def test_profile_brackets_its_iterations(monkeypatch):
    """With the CUDA runtime stood in for: on before START, off before STOP, once each."""
    import torch

    calls = []

    class Runtime:
        cudaProfilerStart = staticmethod(lambda: calls.append("start"))
        cudaProfilerStop = staticmethod(lambda: calls.append("stop"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    profile = Profile("2:4")
    for iteration in range(6):
        profile.before(iteration)
        calls.append(iteration)
    assert calls == [0, 1, "start", 2, 3, "stop", 4, 5]
