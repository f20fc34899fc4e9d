"""FLUX.2 [dev] trained with LoRA on prompts with and without reference images, exported, and read
by plain diffusers."""

import json

import pytest
import torch
from family_cases import DYNAMIC, FP32, latents_for
from kernel_cases import assert_close
from pipelines_flux2 import dev_pipeline, plain_pipeline
from run_cases import ADAMW, script_here, train
from test_flux2_images import TALL, WIDE

from tempflow.types import Size

pytestmark = pytest.mark.slow
CALL = {"height": 32, "width": 32, "guidance_scale": 3.0}


def reference(pipe, latents):
    """By plain diffusers."""
    call = {"num_inference_steps": 2, "max_sequence_length": 80, "output_type": "latent", **CALL}
    return pipe(prompt="number", image=[WIDE, TALL], latents=latents.clone(), **call).images


def test_training_and_export(tmp_path):
    folder, files = dev_pipeline(tmp_path / "dev", **DYNAMIC), {"data": tmp_path / "train.jsonl"}
    WIDE.save(tmp_path / "wide.png")
    TALL.save(tmp_path / "tall.png")
    images = [["wide.png"], [], ["tall.png", "wide.png"], []]
    lines = [
        json.dumps(
            {"prompt": f"number {n}", "images": names} if names else {"prompt": f"number {n}"}
        )
        for n, names in enumerate(images)
    ]
    files["data"].write_text("\n".join(lines) + "\n")
    run = train(
        tmp_path,
        "dev-lora",
        processes=None,
        model={"path": str(folder), "lora": {"rank": 2, "alpha": 4}, "max_sequence_length": 80},
        data={
            "prompts_per_iteration": 2,
            "train": str(files["data"]),
            "heldout": str(files["data"]),
        },
        rollout={
            "height": 32,
            "width": 32,
            "num_steps": 3,
            "plan": {"branch_steps": [0, 1]},
            "guidance_scale": 3.0,
            "micro_batch": 8,
        },
        training={
            "iterations": 2,
            "penalty": {"coef": 0.01},
            "objective": {"clip_low": 0.1, "clip_high": 0.1},
        },
        eval={"every": 2, "prompts": 3, "num_steps": 2},
        checkpoint={"every": 2, "keep": 1},
        deepspeed={"optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-3}}},
    )
    for row in run.rows[1:]:
        assert row["grad_norm"] > 0 and row["kl"] >= 0 and row["mismatch/log_prob"] < 1e-5

    from tempflow.checkpoints import load
    from tempflow.models.opened import load_whole

    done = script_here("export", "--run", run.folder, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    pipe, chosen = plain_pipeline(folder), load.load_tuned(run.folder)
    pipe.load_lora_weights(tmp_path / "out")
    policy = load_whole(chosen.config)
    x = latents_for(policy, Size(32, 32), 1)
    base = policy.sample(
        "number", latents=x, images=[WIDE, TALL], num_steps=2, decode=False, **CALL
    )
    got = load.apply(chosen, policy).sample(
        "number", latents=x, images=[WIDE, TALL], num_steps=2, decode=False, **CALL
    )
    expected = reference(pipe, x)
    assert_close("latents", got, expected, FP32)
    assert torch.norm(got - base) > 1e-3 * base.norm()
    whole = script_here("export", "--run", run.folder, "--out", tmp_path / "whole", "--merge")
    assert whole.returncode == 0, whole.stderr
    merged = plain_pipeline(tmp_path / "whole")
    assert_close("merged", reference(merged, x), expected, FP32)
