"""The checkpoints of a run directory: all of them, the newest whole one, and the best of those that
were evaluated."""

from __future__ import annotations

from pathlib import Path

from tempflow.checkpoints.manifest import problem_with
from tempflow.run.logs import read_metrics


def folder(run_dir: Path, iteration: int) -> Path:
    """The path of an iteration's checkpoint, whether or not it exists."""
    return run_dir / "checkpoints" / f"{iteration:06d}"


def folders(run_dir: Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest first, whole or not."""
    parent = run_dir / "checkpoints"
    return (
        # Only digits: drafts begin with ".saving-" or ".universal-".
        sorted(p for p in parent.iterdir() if p.is_dir() and p.name.isdigit())
        if parent.is_dir()
        else []
    )


def best(run_dir: Path, metric: str) -> Path | None:
    """The checkpoint with the highest `metric` among those whose iteration was evaluated; the first
    of equal ones, None if there are none.

    Only metrics are read, so the checkpoint may be damaged.
    """
    # An evaluation with an image that is not finite does not count: its mean is over those prompts
    # only at which the weights did not fail.
    rows = (
        row
        for row in read_metrics(run_dir)
        if "eval/reward" in row and row.get(metric) is not None and not row.get("eval/not_finite")
    )
    seen = {row["iteration"]: row[metric] for row in rows}
    evaluated = [checkpoint for checkpoint in folders(run_dir) if int(checkpoint.name) in seen]
    return max(evaluated, key=lambda checkpoint: seen[int(checkpoint.name)], default=None)


def newest(run_dir: Path, note=lambda text: None) -> Path | None:
    """The newest whole checkpoint, or None. `note` is told of each newer one that is damaged."""
    for checkpoint in reversed(folders(run_dir)):
        trouble = problem_with(checkpoint)
        if trouble is None:
            return checkpoint
        note(f"checkpoint {checkpoint.name} is skipped: {trouble}")
    return None
