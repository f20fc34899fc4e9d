"""The steps of gpu.py, cheap and fundamental ones first. Each runs in a process of its own and
writes each finding as soon as it has it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Callable


@dataclass(frozen=True)
class Step:
    """One step of gpu.py.

    name: its name on the command line and in the report.
    seconds: its share of ten minutes on an H100, more than it should need there.
    run: "module:function" in this folder; the function takes a Context.
    about: what it does, for the report.
    """

    name: str
    seconds: int
    run: str
    about: str

    def load(self) -> Callable:
        module, _, function = self.run.partition(":")
        return getattr(importlib.import_module(f"gpu_steps.{module}"), function)


STEPS = (
    Step(
        "facts",
        25,
        "facts:facts",
        "versions, the card, the speed of a matrix product and of a copy",
    ),
    Step(
        "families",
        90,
        "families:families",
        "two layers of every family: memory and host waits against the dry run",
    ),
    Step("tests", 50, "suites:tests", "pytest -m gpu of the engine and the rewards"),
    Step("sweeps", 50, "suites:sweeps", "the kernels against float64 on the card"),
    Step(
        "runs",
        120,
        "suites:runs",
        "tiny_ocr through the launcher: LoRA at ZeRO-1, all weights at ZeRO-3, resume, float8",
    ),
    Step(
        "kernels",
        30,
        "kernel_speed:kernel_speed",
        "the kernels' share of copy bandwidth at FLUX-1024",
    ),
    Step(
        "forwards",
        90,
        "forwards:forwards",
        "FLUX.1-dev: a forward eager, as a graph, in float8, compiled; decoding",
    ),
    Step(
        "training",
        80,
        "training:training",
        "FLUX.1-dev: a rollout, then LoRA updates of 1, 2 and 3 states at a time",
    ),
    Step("capture", 20, "capture:capture", "what a failed graph capture leaves behind"),
    Step(
        "trace",
        45,
        "trace:trace",
        "torch.profiler: kernels and gaps of a forward and of a micro-batch",
    ),
)
BY_NAME = {step.name: step for step in STEPS}
