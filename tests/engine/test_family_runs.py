"""Whole runs on tiny pipelines of the families with classifier-free guidance."""

import json
import math

import numpy as np
import pytest
from engine_cases import ROOT
from family_cases import FAMILIES, FP32, NEGATIVES, PROMPTS, latents_for, pipeline_folders
from kernel_cases import assert_close
from PIL import Image
from run_cases import ADAMW, Run, script_here, train

from tempflow.models import load_policy
from tempflow.run.evaluation import fixed_noise
from tempflow.types import Size


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return pipeline_folders(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """One iteration by (family, "full" or "lora"), guided, two updates, with the held-out evaluation."""
    made, root = {}, tmp_path_factory.mktemp("family-runs")

    def get(name, kind):
        if (name, kind) not in made:
            lora = {"rank": 2, "alpha": 4} if kind == "lora" else None
            made[name, kind] = train(
                root,
                f"{name}-{kind}",
                processes=None,
                model={"path": str(folders(name)), "lora": lora, "max_sequence_length": 32},
                data={"prompts_per_iteration": 1},
                rollout={
                    "height": 32,
                    "width": 32,
                    "num_steps": 4,
                    "plan": {"branch_steps": [0, 2]},
                    "guidance_scale": 3.0,
                    "micro_batch": 8,
                },
                training={
                    "iterations": 1,
                    "updates": {"passes": 2},
                    "penalty": {"coef": 0.01},
                    "objective": {"clip_low": 0.1, "clip_high": 0.1},
                },
                eval={"every": 1, "prompts": 2, "guidance_scale": 1.5},
                deepspeed={"optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-3}}},
            )
        return made[name, kind]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training(runs, name, kind):
    run = runs(name, kind)
    base, row = run.rows
    assert row["ratio/max_dev"] > 0 and row["grad_norm"] > 0 and row["kl"] > 0
    assert row["reward/std"] > 0 and row["reward/zero_std_groups"] == 0 and row["mismatch/log_prob"] < 1e-5
    assert math.isfinite(base["eval/reward"]) and row["eval/reward"] != base["eval/reward"], "the model moved"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_export_is_read_by_plain_diffusers(runs, folders, tmp_path, name, kind):
    """And gives the latents of the tuned policy, which are not the base model's."""
    import diffusers

    from tempflow.checkpoints import load
    from tempflow.models.opened import load_whole

    run = runs(name, kind)
    done = script_here("export", "--run", run.folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    pipe = getattr(diffusers, FAMILIES[name].pipeline).from_pretrained(folders(name) if kind == "lora" else tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    if kind == "lora":
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
        pipe.load_lora_weights(tmp_path / "out")
    chosen = load.load_tuned(run.folder)
    policy = load_whole(chosen.config)
    x, call = latents_for(policy, 32, 32), {"height": 32, "width": 32, "guidance_scale": 3.0, "negative_prompts": NEGATIVES}
    base = policy.sample(PROMPTS, latents=x, num_steps=3, decode=False, **call)
    got = load.apply(chosen, policy).sample(PROMPTS, latents=x, num_steps=3, decode=False, **call)
    expected = pipe(
        PROMPTS,
        latents=x.clone(),
        height=32,
        width=32,
        num_inference_steps=3,
        output_type="latent",
        max_sequence_length=32,
        **FAMILIES[name].call(3.0, NEGATIVES),
    ).images
    assert_close("latents", got, expected, FP32)
    assert (got - base).norm() > 1e-3 * base.norm()


@pytest.mark.slow
def test_evaluation_has_a_guidance_of_its_own(runs, folders):
    folder = runs("sd3", "full").folder / "samples/000000"
    first = json.loads((folder / "samples.json").read_text())["items"][0]
    kept = np.asarray(Image.open(folder / first["file"])).astype(int)
    policy = load_policy(folders("sd3"), max_sequence_length=32)
    noise = fixed_noise([0], policy.latent_shape(Size(32, 32)), "cpu")

    def distance(scale):
        (drawn,) = policy.sample([first["prompt"]], latents=noise, height=32, width=32, num_steps=4, guidance_scale=scale)
        return np.abs(kept - np.asarray(drawn)).max()

    assert distance(1.5) <= 1 < distance(3.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_other_scripts(runs, tmp_path, name):
    """evaluate.py finds the run's own held-out reward again; sample.py draws."""
    run = runs(name, "lora")
    done = script_here("evaluate", "--run", run.folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["reward"] == pytest.approx(run.rows[-1]["eval/reward"], abs=1e-3)
    done = script_here("sample", "--run", run.folder, "--out", tmp_path / "out", "--count", 2, "--num-steps", 2)
    assert done.returncode == 0 and len(list((tmp_path / "out").glob("*.png"))) == 3, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name, config", [("sd3", "sd35_lora"), ("qwen_image", "qwen_image_lora")])
def test_shipped_configs_run_on_tiny_pipelines(folders, tmp_path, name, config):
    """But for the model, the size and the amounts: half precision, ZeRO, checkpointing, guidance."""
    settings = {
        "model.path": str(folders(name)),
        "model.max_sequence_length": 32,
        "data.prompts_per_iteration": 1,
        "rollout.height": 32,
        "rollout.width": 32,
        "rollout.num_steps": 4,
        "rollout.plan.seeds": 1,
        "rollout.plan.children": 2,
        "rewards": {"engine_rewards:contrast": 1.0},
        "reward_pool.workers": 0,
        "training.iterations": 1,
        "eval.prompts": 2,
        "eval.num_steps": 2,
        "logging.dir": str(tmp_path),
        "logging.tensorboard": False,
        "data.embedding_cache": str(tmp_path / "cache"),
    }
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    run = Run(tmp_path / config, script_here("train", "--config", ROOT / f"configs/{config}.json", *pairs))
    row = run.rows[-1]
    assert row["iteration"] == 1 and row["grad_norm"] > 0
    assert "warning" not in run.done.stdout
