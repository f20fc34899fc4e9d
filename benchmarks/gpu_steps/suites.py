"""Runs the project's own tests on the card, and counts them one by one."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from gpu_steps import hardware
from gpu_steps.context import ROOT, Context, Skipped

KERNELS, RUNS = "tests/kernels", "tests/engine/test_gpu_runs.py"
REPLAYED = [
    "rollout",
    "decoding",
    "evaluation",
    "weight sync",
    "weight average",
    "LoRA",
    "ZeRO-1",
    "CUDA graphs",
]
# The beginning of "module::test", and the paths that these tests show to work if some of them
# passed and none failed.
SHOWN = {
    "test_noise": ["normal"],
    "test_sde_step": ["sde_step"],
    "test_group_loss": ["group_loss"],
    "test_graphs": ["CUDA graphs"],
    "test_float8": ["float8 suffix"],
    "test_reward_models": ["reward models on the GPU"],
    **{
        f"test_gpu_families::test_graphs_on_the_gpu[{entry['path']}]": [
            entry["path"],
            "CUDA graphs",
        ]
        for entry in hardware.load()
        if entry["area"] == "Families"
    },
    "test_gpu_runs::test_lora": [*REPLAYED, "checkpoint and resume"],
    "test_gpu_runs::test_float8": [*REPLAYED, "float8 suffix"],
    "test_gpu_runs::test_full": ["full fine-tuning", "ZeRO-3", "checkpoint and resume"],
    "test_gpu_runs::test_two_gpus": ["several GPUs"],
}


@dataclass(frozen=True)
class Outcome:
    """The result of one test.

    test: "module::name".
    status: "passed", "failed" or "skipped".
    message: why it was not passed.
    """

    test: str
    status: str
    seconds: float
    message: str


def tests(context: Context) -> None:
    """All tests marked gpu, except those of the two steps below."""
    chosen = ["tests/engine", "tests/rewards", "-m", "gpu", f"--ignore={RUNS}"]
    _run(context, ["tests/engine/test_float8.py", "-m", "gpu"] if context.rehearse else chosen)


def sweeps(context: Context) -> None:
    """Every kernel against float64, and what can be tested of the kernels only on a GPU. A
    rehearsal runs one test, in Triton's interpreter."""
    _run(
        context,
        (
            [KERNELS, "-k", "test_normals_match_float64 and triton"]
            if context.rehearse
            else [KERNELS, "-m", "gpu"]
        ),
    )


def runs(context: Context) -> None:
    """Two iterations of tiny_ocr through the launcher, as a user starts it: LoRA at ZeRO-1 with
    graphs, all weights at ZeRO-3, both resumed, and a float8 suffix. A rehearsal runs the smallest
    of them on the CPU."""
    _run(
        context,
        (
            [RUNS, "-k", "the_same_runs_on_the_cpu and full"]
            if context.rehearse
            else [RUNS, "-m", "gpu"]
        ),
    )


def _run(context: Context, chosen: list[str]) -> None:
    file = context.scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={file}", *chosen]
    done = subprocess.run(command, cwd=ROOT)
    if not file.exists():
        raise AssertionError(
            f"pytest ended with status {done.returncode} before it wrote its results"
        )
    found = outcomes(file)
    counts = {
        status: sum(one.status == status for one in found)
        for status in ("passed", "failed", "skipped")
    }
    context.note(
        **counts,
        tests=[one.__dict__ for one in found if one.status != "skipped" or one.message],
        headline=", ".join(f"{n} {status}" for status, n in counts.items()),
    )
    context.prove(*shown(found))
    failed = [one for one in found if one.status == "failed"]
    if failed:
        raise AssertionError(
            f"{len(failed)} tests failed, the first: {failed[0].test}: {failed[0].message[:300]}"
        )
    if not counts["passed"]:
        reasons = "; ".join(sorted({one.message for one in found}))
        raise Skipped(reasons or f"no test was chosen (pytest ended with status {done.returncode})")


def outcomes(file: Path) -> list[Outcome]:
    """Every test in pytest's XML report."""
    found = []
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        trouble = next(
            (child for child in case if child.tag in ("failure", "error", "skipped")), None
        )
        status = (
            "passed" if trouble is None else "skipped" if trouble.tag == "skipped" else "failed"
        )
        test = f"{case.get('classname', '').split('.')[-1]}::{case.get('name', '')}"
        found.append(
            Outcome(
                test,
                status,
                float(case.get("time", 0)),
                "" if trouble is None else trouble.get("message", ""),
            )
        )
    return found


def shown(found: list[Outcome]) -> list[str]:
    """The paths that these tests show to work."""
    paths: list[str] = []
    for start, names in SHOWN.items():
        own = {one.status for one in found if one.test.startswith(start)}
        if "passed" in own and "failed" not in own:
            paths += names
    return list(dict.fromkeys(paths))
