"""The checkpoints of a run directory: all of them, the newest whole one, the best of those
evaluated."""

from __future__ import annotations

from pathlib import Path

from tempflow.checkpoints.manifest import problem_with
from tempflow.run.logs import read_metrics


def folder(run_dir: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies, or would."""
    return run_dir / "checkpoints" / f"{iteration:06d}"


def folders(run_dir: Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest first, whole or not."""
    parent = run_dir / "checkpoints"
    return (
        sorted(p for p in parent.iterdir() if p.is_dir() and p.name.isdigit())
        if parent.is_dir()
        else []
    )


def best(run_dir: Path, metric: str) -> Path | None:
    """Of the checkpoints whose iteration was evaluated, the one with the highest `metric`, the
    first of equals; None without any.

    An evaluation in which an image was not finite is passed over: its mean is over the prompts that
    the weights did not fail at.
    """
    rows = (
        row
        for row in read_metrics(run_dir)
        if "eval/reward" in row and row.get(metric) is not None and not row.get("eval/not_finite")
    )
    seen = {row["iteration"]: row[metric] for row in rows}
    evaluated = [checkpoint for checkpoint in folders(run_dir) if int(checkpoint.name) in seen]
    return max(evaluated, key=lambda checkpoint: seen[int(checkpoint.name)], default=None)


def newest(run_dir: Path, note=lambda text: None) -> Path | None:
    """The newest whole checkpoint; broken ones are named through `note` and passed over."""
    for checkpoint in reversed(folders(run_dir)):
        trouble = problem_with(checkpoint)
        if trouble is None:
            return checkpoint
        note(f"checkpoint {checkpoint.name} is passed over: {trouble}")
    return None
