"""The small model as a stranger to this project finds it: plain diffusers, the default
arguments."""

import numpy as np
import pytest
import torch
from engine_cases import HELDOUT, MODEL, examples

from tempflow.data.prompts import load_prompts
from tempflow.models import load_policy
from tempflow.rewards.ocr import OcrReward
from tempflow.types import Size


def test_small_and_without_pickles():
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".txt", ".jinja"}


@pytest.mark.slow
def test_plain_diffusers_spells_at_its_defaults():
    """512 text tokens, most of them padding. The card says what 128 words read; 24 words are enough
    to see it spell."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt.text for prompt in load_prompts(HELDOUT)[:24]]
    pictures = pipe(
        prompts,
        height=32,
        width=96,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert all(picture.size == (96, 32) for picture in pictures)
    reward = OcrReward(detect=False)
    reward.load(1)
    values = reward.score(
        np.stack([np.asarray(p) for p in pictures]), prompts, [{}] * len(prompts)
    ).values
    assert 0.3 < values.mean() < 0.75


@pytest.mark.parametrize("length, most", [(18, 0.02), (20, 0.01), (44, 0.005), (128, 0.005)])
def test_padding_of_the_text_hardly_matters(length, most):
    """Velocities against those at 512 tokens."""
    prompts, sigma = (
        ['the word "HELLO"', 'the word "CAT"', 'the word "QUIZ"'],
        torch.tensor([0.9, 0.5, 0.2]),
    )
    velocities = []
    for tokens in (length, 512):
        policy = load_policy(str(MODEL), max_sequence_length=tokens)
        x = torch.randn(
            3, *policy.latent_shape(Size(32, 96)), generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            velocities.append(
                policy.velocity(
                    policy.transformer,
                    x,
                    sigma,
                    policy.encode(examples(prompts)),
                    Size(32, 96),
                    0.0,
                )
            )
    assert (velocities[0] - velocities[1]).norm() < most * velocities[1].norm()
