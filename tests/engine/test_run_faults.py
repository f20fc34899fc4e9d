"""Whole runs beside which something fails: they train and save as if nothing had happened, and say
what it was."""

import errno
import os
import sys
import types
from importlib.machinery import ModuleSpec
from unittest import mock

import pytest
from engine_cases import small_config, write_config
from run_cases import script_here, train

from tempflow.run import evaluation, logs, trackers
from tempflow.run.recorder import Recorder

SMALL = {
    "rollout": {"num_steps": 3, "plan": {"branch_steps": [0, 1]}},
    "training": {"iterations": 1},
    "checkpoint": {"every": 1},
    "eval": {"every": 1, "prompts": 2},
}


def fail(*a, **k):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_by_products_fail_and_the_run_goes_on(tmp_path, monkeypatch):
    """Every picture, report, event, summary and row of metrics; nothing half-written stays."""
    append = logs.AppendFile.append
    monkeypatch.setattr(evaluation.MediaFile, "write", fail)
    monkeypatch.setattr("tempflow.run.report.page.render", fail)
    monkeypatch.setattr(trackers.Board, "log", fail)
    monkeypatch.setattr(
        logs.AppendFile,
        "append",
        lambda self, record, sync=False: fail() if sync else append(self, record),
    )
    run = train(tmp_path, "full", processes=None, logging={"tensorboard": True}, **SMALL)
    warned = [line for line in run.done.stderr.splitlines() if line.startswith("warning: ")]
    names = sorted(line.split()[1] for line in warned)
    assert names == [
        "logging.tensorboard",
        "metrics.jsonl",
        "report.html",
        "samples",
    ], run.done.stderr
    assert (
        all("No space left on device" in line for line in warned)
        and "Traceback" not in run.done.stderr
    )
    assert run.checkpoints == [1] and not list((run.folder / "samples").iterdir())
    assert not [path for path in run.folder.rglob("*") if path.name.endswith(".tmp")]
    assert "iteration 1/1" in run.done.stdout and "report:" not in run.done.stdout


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([], [{"iteration": 3, "eval/reward": 0.5}]),
        (
            [{"iteration": 2, "loss": 0.1}],
            [{"iteration": 2, "loss": 0.1}, {"iteration": 3, "eval/reward": 0.5}],
        ),
        ([{"iteration": 3, "loss": 0.1}], [{"iteration": 3, "loss": 0.1, "eval/reward": 0.5}]),
    ],
)
def test_a_last_evaluation_is_not_put_down_to_another_iteration(tmp_path, rows, expected):
    """A finished run that is resumed evaluates again; rows of metrics.jsonl may have been lost on a
    full disk."""
    with logs.MetricsLog(tmp_path) as log:
        for row in rows:
            log.append(row)
        recorder = Recorder(small_config(), tmp_path, report=mock.Mock())
        recorder.console, recorder._log = mock.Mock(), log
        recorder.merge_into_last_row(3, {"eval/reward": 0.5})
    assert logs.read_metrics(tmp_path) == expected


@pytest.mark.parametrize(
    "error",
    [
        TypeError("init() got an unexpected keyword argument 'projct'"),
        RuntimeError("api_key not configured"),
    ],
)
def test_a_tracker_that_cannot_start_costs_nothing(tmp_path, monkeypatch, error):
    """Status 2 before the model is loaded, and the same command can be mended."""

    def init(**options):
        raise error

    settings = {
        **SMALL,
        "logging": {"dir": str(tmp_path / "runs"), "name": "one", "wandb": {"projct": "p"}},
    }
    with monkeypatch.context() as patched:
        patched.setitem(
            sys.modules,
            "wandb",
            types.SimpleNamespace(init=init, __spec__=ModuleSpec("wandb", None)),
        )
        patched.setattr("tempflow.training.session.open_model", None)
        for _ in range(2):
            done = script_here("train", "--config", write_config(tmp_path, **settings))
            assert (
                done.returncode == 2
                and done.stderr.count("error: ") == 1
                and "Traceback" not in done.stderr
            )
            assert (
                f"error: logging.wandb: wandb.init failed: {type(error).__name__}" in done.stderr
            ), done.stderr
    settings["logging"]["wandb"] = None
    assert script_here("train", "--config", write_config(tmp_path, **settings)).returncode == 0


def test_resume_refuses_other_heldout_prompts(tmp_path, monkeypatch):
    file = tmp_path / "heldout.txt"
    file.write_text("one\ntwo\n")
    settings = {**SMALL, "data": {"heldout": str(file)}}
    train(tmp_path, "prompts", processes=None, **settings)
    file.write_text("one\nfour\n")
    monkeypatch.setattr("tempflow.training.session.open_model", None)
    refused = train(tmp_path, "prompts", "--resume", processes=None, status=2, **settings)
    assert "--resume: data.heldout holds other prompts" in refused.done.stderr
