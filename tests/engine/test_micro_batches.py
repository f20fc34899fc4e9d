"""Micro-batch sizes that a config leaves open are measured once, and kept by what resumes."""

import json
import re

import pytest
from run_cases import train

from tempflow.training import micro_batches
from tempflow.training.micro_batches import fastest

FLAT = 0.01  # seconds of a call, whatever its rows


@pytest.mark.parametrize(
    "per_row, want",
    [
        (lambda rows: 1 + FLAT / rows, 1),
        (lambda rows: 1 + 80 / rows, 256),
        (lambda rows: max(1.0, 8 / rows), 8),
        (lambda rows: 1.0 if rows < 4 else 2.0, 1),
        (lambda rows: {1: 1.0, 2: 0.99, 4: 0.5}.get(rows, 0.6), 4),
    ],
    ids=[
        "no gain",
        "gains to the end",
        "gains to 8",
        "slower beyond 2",
        "a flat stretch before the gain",
    ],
)
def test_the_smallest_size_that_is_nearly_best(per_row, want):
    assert fastest(lambda rows: rows * per_row(rows), 256) == want


def test_sizes_that_do_not_fit_are_passed_over():
    asked = []

    def seconds(rows):
        asked.append(rows)
        return None if rows > 8 else float(rows) / (rows + 1)

    assert fastest(seconds, 256) == 8 and max(asked) == 16
    assert fastest(lambda rows: None, 256) == 1


def test_a_run_measures_once_and_resumes_with_what_it_found(tmp_path, monkeypatch):
    """One that measured again would find other sizes on another day, and with them other bits."""
    open_sizes = {
        "rollout": {"micro_batch": None},
        "training": {"micro_batch": None},
        "eval": {"every": 0},
    }
    monkeypatch.setattr(micro_batches, "MOST", 4)
    run = train(
        tmp_path, "measured", "--set", "training.iterations=1", processes=None, **open_sizes
    )
    told = run.done.stdout + run.done.stderr
    rollout, training = re.search(
        r"measured: rollout.micro_batch (\d+), training.micro_batch (\d+)", told
    ).groups()
    monkeypatch.setattr(micro_batches, "fastest", lambda *_: pytest.fail("measured again"))
    again = train(tmp_path, "measured", "--resume", processes=None, **open_sizes)
    last = json.loads((again.folder / "checkpoints/000002/state.json").read_text())["config"]
    assert (last["rollout"]["micro_batch"], last["training"]["micro_batch"]) == (
        int(rollout),
        int(training),
    )
