"""Updates whose gradient is not finite: skipped on all ranks, counted, named; too many in a row end
the run, saved."""

import itertools

import pytest
import torch
from engine_cases import MODEL
from run_cases import ADAMW, train
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.cpu]


def break_calls(monkeypatch, numbers):
    """Make these calls of the loss (from 0) NaN in their first state."""
    from tempflow.objectives import base

    real, count = base.group_loss, itertools.count()

    def loss_of(*args, **kwargs):
        loss, seen = real(*args, **kwargs)
        if next(count) in numbers:
            log_prob = seen.log_prob.clone()
            log_prob[0] = torch.nan
            return loss * torch.nan, seen._replace(log_prob=log_prob)
        return loss, seen

    monkeypatch.setattr(base, "group_loss", loss_of)


def run(folder, name, stage, status=0, **training):
    """Three iterations of one update on one micro-batch; the first two calls of the loss are the
    check of replays."""
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    return train(
        folder,
        name,
        processes=None,
        training={"iterations": 3, "micro_batch": 16, **training},
        eval={"every": 0},
        checkpoint={"every": 1, "keep": 9},
        status=status,
        deepspeed={"optimizer": ADAMW, "zero_optimization": zero},
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_broken_update_changes_nothing_and_the_next_one_does(tmp_path, monkeypatch, stage):
    break_calls(monkeypatch, {3})
    done = run(tmp_path, f"stage{stage}", stage)
    rows = {row["iteration"]: row for row in done.rows}
    assert [rows[n]["updates/skipped"] for n in (1, 2, 3)] == [0, 1, 0]
    assert rows[2]["grad_norm"] is None and rows[3]["grad_norm"] > 0
    base = load_file(next((MODEL / "transformer").glob("*.safetensors")))
    first, second, third = (
        {name: t for name, t in done.weights(iteration=n).items()} for n in (1, 2, 3)
    )
    assert all(torch.equal(first[name], second[name]) for name in base)
    assert any(not torch.equal(second[name], third[name]) for name in base)
    assert all(tensor.isfinite().all() for tensor in third.values())
    text = " ".join(done.done.stdout.split())
    assert "iteration 2, update 1 skipped" in text and "the word" in text


def test_too_many_in_a_row_stop_the_run_after_saving(tmp_path, monkeypatch):
    break_calls(monkeypatch, set(range(3, 99)))
    done = run(tmp_path, "hopeless", 0, status=2, iterations=9, max_skipped=1)
    assert "training.max_skipped (1)" in done.done.stderr and "saved" in done.done.stderr
    assert [row["iteration"] for row in done.rows if row["iteration"]] == [1, 2]
    assert all(tensor.isfinite().all() for tensor in done.weights().values())
