"""Runs benchmarks/kernels.py at FLUX.1's size: the kernels' speed as a share of the card's own
copy."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from gpu_steps.context import ROOT, Context

CASES = ["--sizes", "FLUX-1024", "--rows", "1", "4", "9", "--children", "1", "6", "--repeats", "20"]
TINY = [
    "--sizes",
    "SD3.5-512",
    "--rows",
    "1",
    "--children",
    "2",
    "--repeats",
    "2",
    "--cases",
    "sde",
    "loss+grad",
]
SHOWN = ("op", "rows", "children", "dtype", "share_of_copy", "share_of_bound", "times_eager")


def load_benchmark() -> ModuleType:
    """Load benchmarks/kernels.py from its file, because the module name `kernels` belongs to
    Hugging Face's package."""
    spec = importlib.util.spec_from_file_location(
        "kernel_benchmark", ROOT / "benchmarks/kernels.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_speed(context: Context) -> None:
    benchmark = load_benchmark()

    def keep(report: dict) -> None:
        rows = report["rows"]
        best = max(rows, key=lambda row: row["share_of_bound"])
        microseconds = [
            {"us": 1e6 * row["seconds"]["median"], "GB/s": row["bytes_per_second"] / 1e9}
            for row in rows
        ]
        headline = (
            f"{len(rows)} cases agree with PyTorch; best {best['op']}: {best['share_of_bound']:.0%}"
            " of its bound"
        )
        context.note(
            report=report,
            headline=headline,
            table=[
                {key: row[key] for key in SHOWN} | speed for row, speed in zip(rows, microseconds)
            ],
        )

    benchmark.run(
        benchmark.parse_arguments(not context.rehearse, TINY if context.rehearse else CASES),
        context.device,
        keep,
    )
    context.prove("sde_step", "group_loss", "normal")
