"""What only Stable Diffusion 3 has: a text encoder that may be left out, a largest size, attention
that diffusers cannot switch."""

from functools import partial

import pytest
from family_cases import FAMILIES, FP32, latents_for
from kernel_cases import assert_close

from tempflow.errors import UserError
from tempflow.models import check_checkpoint, load_policy
from tempflow.models.attention import set_attention_backend
from tempflow.types import Size


def test_saved_without_t5(family_folders, tmp_path):
    """As people do who lack the memory: the pipeline fills its place with zeros."""
    import diffusers

    without = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(family_folders("sd3"), **without)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "small")
    check_checkpoint(tmp_path / "small")
    policy, size = load_policy(tmp_path / "small"), Size(32, 96)
    x, call = latents_for(policy, size), (size, 2, 4.5)
    assert_close(
        "latents",
        FAMILIES["sd3"].sampled(policy, x, *call),
        FAMILIES["sd3"].reference(pipe, x, *call),
        FP32,
    )


def test_size_beyond_the_position_embedding(family_pairs):
    policy, _ = family_pairs("sd3")
    assert policy.latent_shape(Size(128, 128)) == (8, 32, 32)
    for call in (policy.latent_shape, partial(policy.sigmas, 4)):
        with pytest.raises(
            UserError,
            match="rollout.height, rollout.width: 32 x 136; this model makes at most 128 pixels",
        ):
            call(Size(32, 136))


def test_an_attention_backend_is_set_or_refused(family_pairs):
    """Never ignored: the attention of SD3 is not among those that diffusers can switch."""
    set_attention_backend(family_pairs("qwen_image")[0].transformer, "native")
    with pytest.raises(
        UserError, match="model.attention_backend: 'native': .* SD3Transformer2DModel"
    ):
        set_attention_backend(family_pairs("sd3")[0].transformer, "native")
