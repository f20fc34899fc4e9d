"""Whole runs on a tiny pipeline of every family, each serving several tests: LoRA and all weights,
guided, with the KL penalty."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from engine_cases import ROOT
from family_cases import FAMILIES, FP32, NEGATIVES, SIBLINGS, latents_for
from kernel_cases import assert_close
from PIL import Image
from run_cases import ADAMW, Run, script_here, timeless, train

from tempflow.models import load_policy
from tempflow.run.evaluation import fixed_noise
from tempflow.types import Size

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_condition_images")]
EVERY = {**FAMILIES, **SIBLINGS}
KINDS = [(name, kind) for name in EVERY for kind in ("lora", "full")]


@pytest.fixture(scope="module")
def runs(family_folders, tmp_path_factory):
    """Two iterations by (family, "full" or "lora"), two updates each, with the held-out
    evaluation before and after."""
    made, root = {}, tmp_path_factory.mktemp("family-runs")

    def get(name, kind):
        if (name, kind) not in made:
            family, lora = EVERY[name], {"rank": 2, "alpha": 4} if kind == "lora" else None
            made[name, kind] = train(
                root,
                f"{name}-{kind}",
                processes=None,
                model={
                    "path": str(family_folders(name)),
                    "lora": lora,
                    "max_sequence_length": family.text(32),
                },
                data={
                    "prompts_per_iteration": 1,
                    **family.prompt_files(root / name, family.size(32, 32)),
                },
                rollout={
                    "height": 32,
                    "width": 32,
                    **({"frames": family.frames} if family.frames > 1 else {}),
                    "num_steps": 4,
                    "plan": {"branch_steps": [0, 2]},
                    "guidance_scale": family.scale,
                    "micro_batch": 8,
                },
                training={
                    "iterations": 2,
                    "updates": {"passes": 2},
                    "penalty": {"coef": 0.01},
                    "objective": {"clip_low": 0.1, "clip_high": 0.1},
                },
                rewards=family.rewards,
                eval={"every": 2, "prompts": 2, "guidance_scale": 1.5},
                checkpoint={"every": 1, "keep": 2},
                deepspeed={"optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-3}}},
            )
        return made[name, kind]

    return get


@pytest.mark.parametrize("name, kind", KINDS)
def test_training(runs, name, kind):
    run = runs(name, kind)
    base, *rows = run.rows
    for row in rows:
        assert row["ratio/max_dev"] > 0 and row["grad_norm"] > 0 and row["kl"] > 0
        assert (
            row["reward/std"] > 0
            and row["reward/zero_std_groups"] == 0
            and row["mismatch/log_prob"] < 1e-5
        )
    assert math.isfinite(base["eval/reward"])
    assert rows[-1]["eval/reward"] != base["eval/reward"], "the model moved"


@pytest.mark.cpu
@pytest.mark.parametrize("name, kind", KINDS)
def test_resuming(runs, tmp_path, name, kind):
    """The second iteration once more, from the checkpoint of the first, to the bit."""
    run = runs(name, kind)
    shutil.copytree(run.folder, tmp_path / run.folder.name)
    again = Run(tmp_path / run.folder.name)
    shutil.rmtree(again.folder / "checkpoints/000002")
    config = [
        "--config",
        run.folder.parent / f"{run.folder.name}.json",
        "--set",
        f"logging.dir={tmp_path}",
    ]
    again = Run(again.folder, script_here("train", *config, "--resume"))
    assert timeless(again.rows[-1]) == timeless(run.rows[-1])
    for weight, tensor in run.weights().items():
        assert torch.equal(again.weights()[weight], tensor), weight


@pytest.mark.parametrize("name, kind", KINDS)
def test_export_is_read_by_plain_diffusers(runs, family_folders, tmp_path, name, kind):
    """And gives the latents of the tuned policy, which are not the base model's."""
    from tempflow.checkpoints import load
    from tempflow.models.opened import load_whole

    run, family = runs(name, kind), EVERY[name]
    done = script_here("export", "--run", run.folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    folder = family_folders(name) if kind == "lora" else tmp_path / "out"
    pipe = family.plain(folder)
    if kind == "lora":
        assert [file.name for file in (tmp_path / "out").iterdir()] == [
            "pytorch_lora_weights.safetensors"
        ]
        pipe.load_lora_weights(tmp_path / "out")
    chosen = load.load_tuned(run.folder)
    policy, size = load_whole(chosen.config), family.size(32, 32)
    x, call = (
        latents_for(policy, size),
        (size, 3, family.scale, None if family.negative is None else NEGATIVES),
    )
    base = family.sampled(policy, x, *call)
    got = family.sampled(load.apply(chosen, policy), x, *call)
    expected = family.reference(pipe, x, *call, **family.length(32))
    assert_close("latents", got, expected, FP32)
    assert (got - base).norm() > 1e-3 * base.norm()
    if (name, kind) == ("flux2_dev", "lora"):  # its processor is the one that is put in by hand
        merged = tmp_path / "merged"
        done = script_here("export", "--run", run.folder, "--out", merged, "--merge")
        assert done.returncode == 0, done.stderr
        found = family.reference(family.plain(merged), x, *call, **family.length(32))
        assert_close("merged", found, expected, FP32)


def test_evaluation_has_a_guidance_of_its_own(runs, family_folders):
    folder = runs("sd3", "full").folder / "samples/000000"
    first = json.loads((folder / "samples.json").read_text())["items"][0]
    kept = np.asarray(Image.open(folder / first["file"])).astype(int)
    policy = load_policy(family_folders("sd3"), max_sequence_length=32)
    noise = fixed_noise([0], policy.latent_shape(Size(32, 32)), "cpu")

    def distance(scale):
        (drawn,) = policy.sample(
            [first["prompt"]], latents=noise, height=32, width=32, num_steps=4, guidance_scale=scale
        )
        return np.abs(kept - np.asarray(drawn)).max()

    assert distance(1.5) <= 1 < distance(3.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_scripts(runs, tmp_path, name):
    """evaluate.py finds the run's own held-out reward again; sample.py draws."""
    run = runs(name, "lora")
    done = script_here("evaluate", "--run", run.folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["reward"] == pytest.approx(
        run.rows[-1]["eval/reward"], abs=1e-3
    )
    done = script_here(
        "sample", "--run", run.folder, "--out", tmp_path / "out", "--count", 2, "--num-steps", 2
    )
    drawn = [file for file in (tmp_path / "out").iterdir() if file.suffix in (".png", ".webp")]
    assert done.returncode == 0 and len(drawn) >= 2, done.stderr


@pytest.mark.parametrize("name", FAMILIES)
def test_shipped_configs_run_on_tiny_pipelines(family_folders, tmp_path, name):
    """But for the model, the size and the amounts: half precision, ZeRO, checkpointing,
    guidance."""
    family = FAMILIES[name]
    files = family.prompt_files(tmp_path / "prompts", family.size(32, 32))
    settings = {
        "model.path": str(family_folders(name)),
        "model.max_sequence_length": 32,
        **({f"data.{key}": value for key, value in files.items()} if family.images else {}),
        "data.prompts_per_iteration": 1,
        "rollout.height": 32,
        "rollout.width": 32,
        "rollout.num_steps": 4,
        "rollout.plan.seeds": 1,
        "rollout.plan.children": 2,
        **({"rollout.frames": family.frames} if family.frames > 1 else {}),
        "rewards": family.rewards,
        "reward_pool.workers": 0,
        "training.iterations": 1,
        "eval.prompts": 2,
        "eval.num_steps": 2,
        "logging.dir": str(tmp_path),
        "logging.tensorboard": False,
        "data.embedding_cache": str(tmp_path / "cache"),
    }
    pairs = [
        part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    run = Run(
        tmp_path / family.config,
        script_here("train", "--config", ROOT / f"configs/{family.config}.json", *pairs),
    )
    row = run.rows[-1]
    assert row["iteration"] == 1 and row["grad_norm"] > 0
    assert "warning" not in run.done.stdout
