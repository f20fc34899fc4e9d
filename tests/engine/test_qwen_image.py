"""What only Qwen-Image has: a template around the prompt, and a pipeline that guides only where it
is given negative prompts."""

import pytest
import torch
from engine_cases import examples
from family_cases import FP32, PROMPTS, latents_for
from kernel_cases import assert_close

from tempflow.models.embeddings import EmbeddingCache
from tempflow.types import Size


def test_template_is_dropped(family_pairs):
    """What is left is the prompt and the five tokens after it; the rest is padding."""
    policy, pipe = family_pairs("qwen_image")
    mask = policy.encode(examples(PROMPTS))["encoder_hidden_states_mask"]
    lengths = [len(pipe.tokenizer(prompt).input_ids) + 5 for prompt in PROMPTS]
    assert mask.dtype == torch.bool and mask.shape == (2, 512)
    assert torch.equal(mask, torch.arange(512)[None] < torch.tensor(lengths)[:, None])


def test_without_negative_prompts_it_says_that_it_does_not_guide(family_pairs):
    """And equals its pipeline so, as `test_sample_equals_the_pipeline` has it; what training embeds
    is guided."""
    policy, _ = family_pairs("qwen_image")
    x, call = latents_for(policy, Size(32, 32)), {"height": 32, "width": 32, "num_steps": 2}
    with pytest.warns(UserWarning, match="guidance_scale has no effect"):
        got = policy.sample(PROMPTS, latents=x, guidance_scale=4.0, decode=False, **call)
    assert torch.equal(
        got, policy.at(Size(32, 32), 1.0).integrate(x, policy.encode(examples(PROMPTS)), 2)
    )
    guided = policy.sample(
        PROMPTS, latents=x, guidance_scale=4.0, negative_prompts=[" "] * 2, decode=False, **call
    )
    again = policy.at(Size(32, 32), 4.0).integrate(
        x, EmbeddingCache(policy).get(examples(PROMPTS)), 2
    )
    assert_close("latents", again, guided, FP32)
    assert (got - guided).norm() > 1e-3 * got.norm()
