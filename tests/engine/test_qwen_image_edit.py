"""Qwen-Image-Edit and Edit-Plus against plain diffusers, and what becomes of their condition
images."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from family_cases import DYNAMIC, FAMILIES, FP32, NEGATIVES, PROMPTS, drawn, rescaled
from kernel_cases import assert_close
from pipelines_qwen_image_edit import edit_pipeline
from ragged_policy import Sharded

from tempflow.errors import UserError
from tempflow.models import load_policy
from tempflow.models.embeddings import embed_one
from tempflow.types import Example, Size

BUILDS = {"edit": {}, "plus": {"plus": True}, "2511": {"plus": True, "zero_cond_t": True}}
SIZES = [(32, 96), (48, 48)]


WIDE, TALL = drawn(90, 160, 0), drawn(150, 64, 1)
# of PROMPTS
IMAGES = {"edit": [[WIDE], [TALL]], "plus": [[WIDE], [TALL, WIDE]], "2511": [[WIDE, TALL], [TALL]]}


def plain(name, folder):
    kind = "QwenImageEditPipeline" if name == "edit" else "QwenImageEditPlusPipeline"
    return replace(FAMILIES["qwen_image_edit"], pipeline=kind).plain(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(
        lambda name: edit_pipeline(
            tmp_path_factory.mktemp("edit") / name, **BUILDS[name], **DYNAMIC
        )
    )


@pytest.fixture(scope="module")
def pairs(folders):
    """A policy, and diffusers' own pipeline loaded apart."""
    return cache(lambda name: (load_policy(folders(name)), plain(name, folders(name))))


def latents_for(policy, height, width):
    return torch.randn(
        2, *policy.latent_shape(Size(height, width)), generator=torch.Generator().manual_seed(0)
    )


def expected(pipe, name, latents, scale, negatives, **call):
    """One prompt at a time: Plus takes no more, and Edit scales all images of a call to the first
    one's shape."""
    made = []
    for images, prompt, negative, x in zip(
        IMAGES[name], PROMPTS, negatives or [None, None], latents, strict=True
    ):
        given = {
            "image": images[0] if name == "edit" else images,
            "prompt": prompt,
            "negative_prompt": negative,
            "true_cfg_scale": scale,
        }
        made += pipe(**given, latents=x[None].clone(), num_inference_steps=3, **call).images
    return made


@pytest.mark.parametrize("height, width", SIZES, ids=str)
@pytest.mark.parametrize("scale, negatives", [(1.0, None), (4.0, NEGATIVES)])
@pytest.mark.parametrize("name", BUILDS)
def test_sample_equals_the_pipeline(
    pairs, small_condition_images, name, scale, negatives, height, width
):
    """Images of several shapes and numbers in one call, none of the output's shape."""
    policy, pipe = pairs(name)
    x, size = latents_for(policy, height, width), {"height": height, "width": width}
    call = {
        "latents": x,
        "num_steps": 3,
        "guidance_scale": scale,
        "negative_prompts": negatives,
        "images": IMAGES[name],
        **size,
    }
    got = policy.sample(PROMPTS, decode=False, **call)
    assert_close(
        "latents",
        got,
        torch.stack(expected(pipe, name, x, scale, negatives, output_type="latent", **size)),
        FP32,
    )
    assert (
        got - policy.sample(PROMPTS, decode=False, **{**call, "images": IMAGES[name][::-1]})
    ).norm() > 1e-3 * got.norm()
    difference = np.stack(policy.sample(PROMPTS, **call)).astype(int) - np.stack(
        expected(pipe, name, x, scale, negatives, **size)
    )
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3


@pytest.mark.parametrize("name", ["edit", "plus"])
def test_an_embedding_at_a_megapixel(tmp_path, name):
    """As it is in use, with a VAE of more halvings. What data.embedding_cache loads makes the same,
    whatever model.vae_tiling says."""
    folder = edit_pipeline(tmp_path / name, halvings=5, **BUILDS[name], **DYNAMIC)
    part, pipe = load_policy(folder, parts="text"), plain(name, folder)
    assert part.pipe.transformer is None and part.pipe.vae is not None
    part.pipe.vae.enable_tiling()
    made = embed_one(part, Example(PROMPTS[0], images=(np.asarray(WIDE),)))
    seen = {}

    def transformer(hidden_states, encoder_hidden_states, img_shapes, **_):
        seen.update(tokens=hidden_states, text=encoder_hidden_states, shapes=img_shapes)
        return (hidden_states,)

    pipe.transformer.forward = transformer
    x = torch.zeros(1, 2 * 3, 16)
    pipe(
        image=WIDE,
        prompt=PROMPTS[0],
        latents=x,
        height=128,
        width=192,
        num_inference_steps=1,
        true_cfg_scale=1.0,
        output_type="latent",
    )
    assert seen["shapes"] == [[(1, 2, 3), (1, 12, 21)]] and made["image_tokens_0"].shape == (
        12,
        21,
        16,
    )
    assert torch.equal(made["image_tokens_0"].flatten(0, 1), seen["tokens"][0, 6:])
    assert torch.equal(made["encoder_hidden_states"], seen["text"][0])


def test_a_negative_prompt_keeps_the_images(pairs, small_condition_images):
    """And is two forwards, put together token by token."""
    policy, _ = pairs("plus")
    example = Example(PROMPTS[0], NEGATIVES[0], tuple(map(np.asarray, IMAGES["plus"][1])))
    both = policy.encode([example])
    alone = policy.embed([Example(NEGATIVES[0], None, example.images)])
    assert len(alone) == 3 and all(
        torch.equal(both[f"negative_{name}"], tensor) for name, tensor in alone.items()
    )
    x, sigma, size = latents_for(policy, 32, 96)[:1], torch.tensor([0.7]), Size(32, 96)
    with torch.no_grad():
        guided = policy.velocity(policy.denoiser(), x, sigma, both, size, 4.0)
        positive = policy.velocity(policy.denoiser(), x, sigma, both, size, 1.0)
        negative = policy.velocity(policy.denoiser(), x, sigma, alone, size, 1.0)
    assert_close("velocity", guided, rescaled(positive, negative, 4.0), FP32)
    assert both["encoder_hidden_states"].shape != both["negative_encoder_hidden_states"].shape
    with torch.no_grad():  # in one forward, the shorter text padded and masked
        joined = policy.velocity(Sharded(policy.denoiser()), x, sigma, both, size, 4.0)
    assert_close("joined", joined, guided, FP32)


def test_without_negative_prompts_there_is_no_guidance(pairs, small_condition_images):
    policy, _ = pairs("edit")
    x, call = (
        latents_for(policy, 32, 96),
        {"height": 32, "width": 96, "num_steps": 1, "images": IMAGES["edit"], "decode": False},
    )
    with pytest.warns(
        UserWarning, match="guidance_scale has no effect, as in QwenImageEditPipeline"
    ):
        got = policy.sample(PROMPTS, latents=x, guidance_scale=4.0, **call)
    assert torch.equal(got, policy.sample(PROMPTS, latents=x, guidance_scale=1.0, **call))


@pytest.mark.parametrize("name, least, most", [("edit", 1, 1), ("plus", 1, 3)])
def test_images_that_it_does_not_take(pairs, name, least, most):
    policy, _ = pairs(name)
    call = {
        "latents": latents_for(policy, 32, 32)[:1],
        "height": 32,
        "width": 32,
        "num_steps": 1,
        "guidance_scale": 1.0,
    }
    with pytest.raises(UserError, match="images: prompt 0: has no images"):
        policy.sample("a", **call)
    with pytest.raises(UserError, match=f"images: prompt 0: has {most + 1} images"):
        policy.sample("a", images=[WIDE] * (most + 1), **call)


@pytest.mark.parametrize("name, images", [("edit", 1), ("plus", 3)])
def test_the_dry_run_counts_the_condition(folders, name, images):
    """As long a prompt as is allowed, and as many images, square: of a megapixel for the VAE, and
    what the text encoder sees."""
    from tempflow.models import family_of

    made = (
        family_of(str(folders(name)))
        .skeleton(str(folders(name)), max_sequence_length=20)
        .embed([Example("")])
    )
    assert [made[f"image_tokens_{n}"].shape for n in range(images)] == [
        (1, 128, 128, 16)
    ] * images and len(made) == images + 1
    seen = 37 * 37 if name == "edit" else 3 * 14 * 14
    assert seen + 20 < made["encoder_hidden_states"].shape[1] < seen + 20 + 40
