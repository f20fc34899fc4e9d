"""A packed base without a rollout copy, and one with adapters that training starts from: both runs
resume to the same bits, and are evaluated and exported like others."""

import json
import shutil

import pytest
import torch
from run_cases import ADAMW, script_here, timeless, train
from safetensors.torch import load_file
from test_elastic import same
from test_shared_base import LORA

from tempflow.models.quantized import KINDS

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.cpu, pytest.mark.slow]  # runs in this process, compared to the last bit
NAMES = ("bare", "started")
# Rewards are of uint8 images: one level of one pixel of two images of 32 x 96, in percent. Two ways
# of adding an adapter differ in the last bits, which moves some values to the next level.
LEVEL = 100 / 255 / (32 * 48 * 3) / 2
SOME = 20 * LEVEL


def settings(kind: str, lora: dict = LORA, **rollout) -> dict:
    """Two iterations with few forwards; an evaluation before and after them."""
    plan = {"branch_steps": [0], "seeds": 1}
    return {
        "model": {"lora": lora, "quantize": kind},
        "rollout": {"num_steps": 2, "plan": plan, "lanes": 1, **rollout},
        "training": {"iterations": 2, "penalty": {"coef": 0.05}},
        "eval": {"every": 2, "prompts": 2},
        "checkpoint": {"every": 1, "keep": 2},
        "deepspeed": {
            "optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-2}},
            "zero_optimization": {"stage": 1},
        },
    }


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tmp_path_factory):
    """By name the settings and the run: one without a rollout copy, and one with a copy that starts
    from the adapters of the first."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    without = settings(kind, replica=False)
    bare = train(folder, "bare", processes=None, **without)
    exported = script_here("export", "--run", bare.folder, "--out", folder / "lora")
    assert exported.returncode == 0, exported.stderr
    start = settings(kind, {**LORA, "start": str(folder / "lora")})
    started = train(folder, "started", processes=None, **start)
    return {"bare": (without, bare), "started": (start, started)}


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_goes_on_to_the_same_bits(runs, name, tmp_path):
    changes, run = runs[name]
    assert all(row["grad_norm"] > 0 for row in run.rows[1:]) and run.checkpoints == [1, 2]
    assert max(row["mismatch/log_prob"] for row in run.rows[1:]) < 1e-6
    shutil.copytree(run.folder, tmp_path / name)
    shutil.rmtree(tmp_path / name / "checkpoints/000002")
    again = train(tmp_path, name, "--resume", processes=None, **changes)
    assert [timeless(row) for row in again.rows] == [timeless(row) for row in run.rows]
    assert same(again.weights(), run.weights()) and not same(run.weights(1), run.weights())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_evaluated_and_exported(runs, name, tmp_path):
    """An evaluation of its own finds the run's rewards; the export holds the trained adapters."""
    _, run = runs[name]
    scored = script_here("evaluate", "--run", run.folder)
    assert scored.returncode == 0, scored.stderr
    reward = run.rows[-1]["eval/reward"]
    assert json.loads(scored.stdout)["reward"] == pytest.approx(reward, abs=SOME)
    done = script_here("export", "--run", run.folder, "--out", tmp_path / "lora")
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    trained = run.weights()
    assert len(saved) == len(trained)
    for key, value in trained.items():
        assert torch.equal(saved[f"transformer.{key.replace('.default', '')}"], value), key


def test_a_run_begins_where_its_start_ended(runs):
    """Iteration 0 scores the adapters of `model.lora.start`, not the base."""
    before, *_, after = (row["eval/reward"] for row in runs["bare"][1].rows if "eval/reward" in row)
    assert abs(after - before) > 10 * SOME
    assert runs["started"][1].rows[0]["eval/reward"] == pytest.approx(after, abs=SOME)
