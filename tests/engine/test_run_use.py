"""What the other scripts make of a run on the shipped model: exported, scored and sampled it is the
run's own."""

import json

import numpy as np
import pytest
import torch
from engine_cases import HELDOUT, MODEL
from kernel_cases import assert_close
from PIL import Image
from run_cases import ADAMW, FEW_STEPS, Run, script, script_here, train

from tempflow.run.drift import between_folders
from tempflow.run.means import gain_text
from tempflow.types import Size

# One rank against two, a run against its resumed half, bit for bit: the CPU's part. A GPU's is
# test_gpu_runs.py.
pytestmark = [pytest.mark.slow, pytest.mark.cpu]


def sampled(policy, prompts, decode=False):
    shape = policy.latent_shape(Size(32, 96))
    latents = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(3))
    call = {"latents": latents, "height": 32, "width": 96, "num_steps": 6, "guidance_scale": 0.0}
    return policy.sample(prompts, decode=decode, **call), latents


PROMPTS = ['the word "HELLO"', 'the word "FLOW"']


def through_diffusers(pipe, latents):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS,
        latents=latents,
        height=32,
        width=96,
        num_inference_steps=6,
        guidance_scale=0.0,
        max_sequence_length=20,
        output_type="latent",
    ).images


def tuned_latents(run: Run, which=None):
    """What the run's own loading code makes of PROMPTS: before training, tuned, and from which
    noise."""
    from tempflow.checkpoints import load
    from tempflow.models.opened import load_whole

    chosen = load.load_tuned(run.folder, which=which)
    policy = load_whole(chosen.config)
    base, latents = sampled(policy, PROMPTS)
    after, _ = sampled(load.apply(chosen, policy), PROMPTS)
    return base, after, latents


def exported(run: Run, out, *more, run_script=script_here):
    done = run_script("export", "--run", run.folder, "--out", out, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(out.parent.glob(f".{out.name}*")), "no draft is left behind"
    return done.stdout


@pytest.mark.parametrize(
    "which, run_script", [("ema", script), ("raw", script_here)], ids=["ema", "raw"]
)
def test_export_loads_in_diffusers(whole, tmp_path, which, run_script):
    from diffusers import FluxPipeline

    base, after, latents = tuned_latents(whole, which)
    text = exported(whole, tmp_path / "model", "--weights", which, run_script=run_script)
    assert f"iteration 4 ({which} weights)" in text
    got = through_diffusers(FluxPipeline.from_pretrained(tmp_path / "model"), latents)
    assert_close("latents", got, after, 1e-5)
    assert (after - base).norm() > 1e-3 * base.norm(), "the tuned model is another one"


@pytest.fixture(scope="session")
def lora_run(folder):
    return train(
        folder,
        "lora",
        processes=None,
        model={"lora": {"rank": 4, "alpha": 8.0}},
        rollout=FEW_STEPS,
        training={
            "iterations": 2,
            "updates": {"passes": 2},
            "penalty": {"coef": 0.05, "form": "v"},
        },
        deepspeed={"optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-2}}},
    )


def test_lora_run(lora_run):
    rows = lora_run.rows
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert rows[1]["kl"] > 0 and rows[2]["kl"] > 0
    # 12 states, each with its reference's forward, and a second update without it
    assert rows[1]["forwards/train"] == 3 * 12
    weights = lora_run.weights()
    assert all(".lora_A." in name or ".lora_B." in name for name in weights) and len(weights) > 20
    assert all(4 in tensor.shape for tensor in weights.values())
    assert all(tensor.abs().max() > 0 for tensor in weights.values()), "every adapter has learned"


def test_lora_export_loads_in_diffusers(lora_run, tmp_path):
    from diffusers import FluxPipeline

    base, after, latents = tuned_latents(lora_run)
    assert (after - base).norm() > 1e-3 * base.norm()
    assert "LoRA" in exported(lora_run, tmp_path / "adapters")
    pipe = FluxPipeline.from_pretrained(MODEL)
    assert_close("base", through_diffusers(pipe, latents), base, 1e-5)
    pipe.load_lora_weights(tmp_path / "adapters")
    assert_close("adapters", through_diffusers(pipe, latents), after, 1e-5)

    exported(lora_run, tmp_path / "merged", "--merge")
    assert_close(
        "merged",
        through_diffusers(FluxPipeline.from_pretrained(tmp_path / "merged"), latents),
        after,
        1e-5,
    )


def test_a_run_starts_where_an_exported_one_ended(lora_run, folder, tmp_path):
    """Its first evaluation is the last of the run that was exported, and its policy is what the
    replica holds."""
    assert "LoRA" in exported(lora_run, tmp_path / "adapters")
    lora = {"rank": 4, "alpha": 8.0, "start": str(tmp_path / "adapters")}
    run = train(
        folder,
        "started",
        processes=None,
        model={"lora": lora},
        rollout=FEW_STEPS,
        training={"iterations": 1, "penalty": {"coef": 0.05}},
    )
    assert run.rows[0]["eval/reward"] == pytest.approx(lora_run.rows[-1]["eval/reward"], abs=1e-6)
    assert run.rows[1]["kl"] > 0, "the reference is the model without adapters"
    assert run.rows[1]["mismatch/log_prob"] < 1e-4, "rollouts came from the same policy"


def test_evaluate_repeats_the_runs_own_evaluation(whole, tmp_path, monkeypatch):
    """And its gain and drift, with the base beside it; without DeepSpeed, whose import alone takes
    seconds."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    done = script("evaluate", "--run", whole.folder, "--compare", "--out", tmp_path / "pictures")
    assert done.returncode == 0, done.stderr
    assert " tempflow.models.opened" in done.stderr and " deepspeed" not in done.stderr
    found, row = json.loads(done.stdout.splitlines()[-1]), whole.rows[4]
    assert found["reward"] == pytest.approx(row["eval/reward"], abs=1e-6)
    assert found["base_reward"] == pytest.approx(whole.rows[0]["eval/reward"], abs=1e-6)
    assert found["weights"] == "ema" and found["iteration"] == 4 and found["prompts"] == 8
    assert found["gain"] == pytest.approx(row["eval/gain"], abs=1e-6) and found[
        "gain_stderr"
    ] == pytest.approx(row["eval/gain/stderr"])
    for key in (
        "drift/color_shift",
        "drift/color_spread",
        "drift/diversity",
        "eval/precision",
        "eval/recall",
    ):
        assert found[key] == pytest.approx(row[key], rel=1e-6), key
    assert (
        "base: reward" in done.stderr
        and f"gain {gain_text(found['gain'], found['gain_stderr'])}; drift: color shift"
        in done.stderr
    )
    assert between_folders(tmp_path / "pictures/base", tmp_path / "pictures/tuned") == {
        key: found[key] for key in found if "drift/" in key
    }
    for name in ("base", "tuned"):
        assert (
            len(list((tmp_path / "pictures" / name).glob("*.png"))) == 8
            and (tmp_path / "pictures" / name / "samples.json").exists()
        )


def test_sample_shows_base_beside_tuned(whole, tmp_path):
    """The held-out prompts at the evaluation's noise: the very pictures of the run, at the start
    and at the end."""
    done = script("sample", "--run", whole.folder, "--out", tmp_path / "pairs", "--count", 3)
    assert done.returncode == 0, done.stderr
    assert (
        (tmp_path / "pairs/prompts.txt")
        .read_text()
        .splitlines()[0]
        .endswith(HELDOUT.read_text().splitlines()[0])
    )
    for n in range(3):
        pair = np.asarray(Image.open(tmp_path / f"pairs/{n:04d}.png")).astype(int)
        for iteration, half in ((0, pair[:, :96]), (4, pair[:, -96:])):
            own = np.asarray(Image.open(whole.folder / f"samples/{iteration:06d}/{n:04d}.png"))
            assert np.abs(half - own).max() <= 1
    assert len(list((tmp_path / "pairs").glob("*.png"))) == 4
