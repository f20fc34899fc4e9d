"""Whole runs on the two experts of Wan 2.2: LoRA and all weights, on one and two ranks, at ZeRO 0
and 3, resumed, exported."""

import shutil

import pytest
import torch
from family_cases import FP32, NEGATIVES, PROMPTS
from kernel_cases import assert_close
from pipelines_wan import wan_pipeline
from run_cases import ADAMW, SGD, Run, script_here, timeless, train
from test_wan import latents_for

from tempflow.models import load_policy
from tempflow.models.lora import load_adapters
from tempflow.types import Size

pytestmark = pytest.mark.slow
SIZE = Size(32, 32, 5)
ZERO3 = {**SGD, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return wan_pipeline(tmp_path_factory.mktemp("experts") / "wan", experts=True, shift=3.0)


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    made, root = {}, tmp_path_factory.mktemp("wan-runs")

    def get(name, lora, processes=None, deepspeed=None, **rollout):
        if name not in made:
            made[name] = train(
                root,
                name,
                processes=processes,
                model={
                    "path": str(model),
                    "lora": {"rank": 2, "alpha": 4} if lora else None,
                    "max_sequence_length": 32,
                },
                data={"prompts_per_iteration": 1},
                # Sigma 1 and 0.9 are the first expert's, 0.75 and 0.5 the second's: rows and ranks
                # are at both.
                rollout={
                    "height": SIZE.height,
                    "width": SIZE.width,
                    "frames": SIZE.frames,
                    "num_steps": 4,
                    "plan": {"branch_steps": [0, 2]},
                    "guidance_scale": 3.0,
                    "micro_batch": 8,
                    **rollout,
                },
                training={
                    "iterations": 2,
                    "micro_batch": 1,
                    "updates": {"passes": 2},
                    "penalty": {"coef": 0.01},
                    "objective": {"clip_low": 0.1, "clip_high": 0.1},
                },
                rewards={"engine_rewards:contrast": {"weight": 1.0, "frames": 2}},
                eval={"every": 2, "prompts": 2, "guidance_scale": 1.5},
                checkpoint={"every": 1, "keep": 2},
                deepspeed=deepspeed
                or {"optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-3}}},
            )
        return made[name]

    return get


def experts_moved(run) -> set[str]:
    before, after = run.weights(1), run.weights(2)
    return {
        name.split(".")[0]
        for name, weight in after.items()
        if not torch.equal(weight, before[name])
    }


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_both_experts_are_trained_and_resumed(runs, tmp_path, kind):
    run = runs(kind, kind == "lora")
    for row in run.rows[1:]:
        assert row["grad_norm"] > 0 and row["kl"] > 0 and row["mismatch/log_prob"] < 1e-5
    assert experts_moved(run) == {"transformer", "transformer_2"}
    shutil.copytree(run.folder, tmp_path / kind)
    shutil.rmtree(tmp_path / kind / "checkpoints/000002")
    config = ["--config", run.folder.parent / f"{kind}.json", "--set", f"logging.dir={tmp_path}"]
    again = Run(tmp_path / kind, script_here("train", *config, "--resume"))
    assert timeless(again.rows[-1]) == timeless(run.rows[-1])
    assert all(torch.equal(again.weights()[name], weight) for name, weight in run.weights().items())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_export_is_read_by_plain_diffusers(runs, model, tmp_path, kind):
    from diffusers import WanPipeline

    from tempflow.checkpoints import load
    from tempflow.models.opened import load_whole

    run, out = runs(kind, kind == "lora"), tmp_path / "out"
    done = script_here("export", "--run", run.folder, "--out", out)
    assert done.returncode == 0, done.stderr
    pipe = WanPipeline.from_pretrained(model if kind == "lora" else out)
    pipe.set_progress_bar_config(disable=True)
    if kind == "lora":
        pipe.load_lora_weights(out / "transformer")
        pipe.load_lora_weights(out / "transformer_2", load_into_transformer_2=True)
        trained = {
            name.replace(".default.weight", ".weight"): weight
            for name, weight in run.weights().items()
        }
        saved = load_adapters(out)
        assert (saved.rank, saved.alpha) == (2, 4) and saved.weights.keys() == trained.keys()
        assert all(torch.equal(saved.weights[name], weight) for name, weight in trained.items())
    chosen = load.load_tuned(run.folder)
    policy, call = load_whole(chosen.config), {"height": 32, "width": 32, "guidance_scale": 3.0}
    x = latents_for(policy, SIZE)
    mine = {**call, "frames": 5, "num_steps": 4, "negative_prompts": NEGATIVES, "decode": False}
    base = policy.sample(PROMPTS, latents=x, **mine)
    got = load.apply(chosen, policy).sample(PROMPTS, latents=x, **mine)
    theirs = {
        **call,
        "num_frames": 5,
        "num_inference_steps": 4,
        "negative_prompt": NEGATIVES,
        "max_sequence_length": 32,
    }
    assert_close(
        "latents",
        got,
        pipe(PROMPTS, latents=x.clone(), output_type="latent", **theirs).frames,
        FP32,
    )
    assert (got - base).norm() > 1e-3 * base.norm()


def test_two_ranks_at_zero_3_train_as_one_at_zero_0(runs):
    """All weights, by plain gradient descent, a state a micro-batch: of one expert or of the other.
    Rollouts go through the engine, so that every forward gathers weights on both ranks."""
    plain = runs("plain", False, None, SGD)
    sharded = runs("sharded", False, 2, ZERO3, replica=False)
    for iteration in (1, 2):
        for name, weight in plain.weights(iteration).items():
            assert_close(name, sharded.weights(iteration)[name], weight, 1e-4)


def test_a_run_goes_on_from_its_exported_adapters(runs, model, tmp_path):
    out = tmp_path / "out"
    assert script_here("export", "--run", runs("lora", True).folder, "--out", out).returncode == 0
    from tempflow.config import Lora
    from tempflow.models import load_denoiser
    from tempflow.training.engine import add_lora

    module = load_denoiser(str(model), torch.float32)
    add_lora(module, Lora(rank=2, alpha=4.0, start=str(out)), load_policy(model).lora_targets, 0)
    held = {
        name.replace(".default.weight", ".weight"): weight
        for name, weight in module.named_parameters()
        if ".lora_" in name
    }
    assert held.keys() == load_adapters(out).weights.keys()
    assert all(
        torch.equal(weight, load_adapters(out).weights[name]) for name, weight in held.items()
    )
