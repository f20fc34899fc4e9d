"""What only Qwen-Image 2.1 has: its own grid, a forward without condition images, and text that
cannot be padded."""

import json
from contextlib import nullcontext

import pytest
import torch
from engine_cases import ROOT, examples
from family_cases import FAMILIES, FP32, NEGATIVES, PROMPTS, latents_for
from kernel_cases import assert_close

from tempflow.config import load_config
from tempflow.errors import UserError
from tempflow.models import load_policy
from tempflow.models.hub import local_model
from tempflow.training.start import checked_inputs
from tempflow.types import Size

FAMILY, SIZE = FAMILIES["qwen_image_21"], Size(64, 64)
GRID = [1.0, 0.7, 0.2]  # of a distilled checkpoint


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    folder = FAMILY.build(
        tmp_path_factory.mktemp("distilled") / "model", sample_sigmas=GRID, shift=3.0
    )
    return load_policy(str(folder)), FAMILY.plain(folder)


def test_a_checkpoints_own_grid_is_used_for_as_many_steps(distilled):
    """The pipeline takes it whatever the number of steps; here another number makes even steps, as
    in training."""
    policy, pipe = distilled
    x = latents_for(policy, SIZE)
    assert_close(
        "latents",
        FAMILY.sampled(policy, x, SIZE, 3, 1.0),
        FAMILY.reference(pipe, x, SIZE, 40, 1.0),
        FP32,
    )
    own, even = policy.sigmas(3, SIZE), policy.sigmas(5, SIZE)
    wanted = torch.tensor([*GRID, 0.0])
    assert_close("grid", own, 3 * wanted / (1 + 2 * wanted), FP32)
    assert len(even) == 6 and even[0] == 1 and even[-1] == 0


def test_the_forward_for_text_is_that_of_diffusers(family_pairs):
    """With the mask that says so, it is diffusers' own that runs: one prediction and another, for
    one and two rows, by prompt length."""
    policy, pipe = family_pairs("qwen_image_21")
    rows, columns = SIZE.height // 16, SIZE.width // 16
    for prompt in PROMPTS:
        text = policy.embed(examples([prompt]))["encoder_hidden_states"].expand(2, -1, -1)
        x, sigma = latents_for(policy, SIZE), torch.tensor([0.9, 0.3])
        mask = torch.arange(text.shape[1] + rows * columns // 4) >= text.shape[1]
        given = {
            "hidden_states": x,
            "encoder_hidden_states": text,
            "timestep": sigma,
            "img_shapes": [[(1, rows, columns)]] * 2,
        }
        with torch.no_grad():
            whole = pipe.transformer(**given, img_mask=mask.expand(2, -1), return_dict=False)[0]
            got = policy.transformer(**given)[0]
        assert whole.shape[1] == text.shape[1] + rows * columns
        assert_close("prediction", got, whole[:, text.shape[1] :], FP32)


def test_texts_of_two_lengths_share_no_forward(family_pairs):
    policy, _ = family_pairs("qwen_image_21")
    short, long = (policy.embed(examples([text])) for text in NEGATIVES[::-1])
    with pytest.raises(ValueError, match="texts of .* cannot share a forward"):
        policy._join(short, long)
    assert len(policy._join(short, short)["encoder_hidden_states"]) == 2


@pytest.mark.parametrize(
    "key, stage, replica, rollout, evaluation",
    [
        ("rollout.guidance_scale", 3, True, 4.0, None),
        ("eval.guidance_scale", 3, False, 1.0, 4.0),
        (None, 3, True, 1.0, 4.0),
        (None, 3, False, 1.0, None),
        (None, 2, True, 4.0, None),
    ],
)
def test_guidance_at_zero_3_is_refused_at_the_start(key, stage, replica, rollout, evaluation):
    """Where a guided forward would go through the engine, of the rollout or of an evaluation."""
    config = load_config(
        ROOT / "configs/qwen_image_21_lora.json",
        [
            f"model.path={local_model('Qwen/Qwen-Image-2.1')}",
            f"deepspeed.zero_optimization.stage={stage}",
            f"rollout.replica={json.dumps(replica)}",
            f"rollout.guidance_scale={rollout}",
            f"eval.guidance_scale={json.dumps(evaluation)}",
        ],
    )
    refused = pytest.raises(UserError, match=f"^{key}: 4 at .*; set the scale to 1, or the stage")
    with refused if key else nullcontext():
        checked_inputs(config, dry=True)
