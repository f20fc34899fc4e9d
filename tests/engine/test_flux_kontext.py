"""FLUX.1-Kontext against plain diffusers, and what becomes of its condition images."""

import numpy as np
import pytest
import torch
from family_cases import DYNAMIC, FP32, PROMPTS, drawn
from kernel_cases import assert_close
from pipelines_flux_kontext import kontext_pipeline

from tempflow.errors import UserError
from tempflow.models import load_policy
from tempflow.models.embeddings import embed_one
from tempflow.types import Example, Size

IMAGES = [drawn(90, 160, 0), drawn(150, 64, 1)]  # wide and tall


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kontext_pipeline(tmp_path_factory.mktemp("kontext") / "model", halvings=5, **DYNAMIC)


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(folder, max_sequence_length=64)


@pytest.fixture(scope="module")
def pipe(folder):
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected(pipe, latents, height, width, **more):
    """One prompt at a time: the pipeline scales all images of a call to the first one's shape, and
    the output to a megapixel."""
    call = {
        "height": height,
        "width": width,
        "max_area": height * width,
        "num_inference_steps": 3,
        "max_sequence_length": 64,
        **more,
    }
    made = [
        pipe(image=image, prompt=prompt, latents=x[None].clone(), guidance_scale=2.5, **call).images
        for image, prompt, x in zip(IMAGES, PROMPTS, latents, strict=True)
    ]
    return torch.cat(made) if "output_type" in more else [image for (image,) in made]


@pytest.mark.parametrize("height, width", [(128, 320), (192, 192)], ids=str)
def test_sample_equals_the_pipeline(policy, pipe, height, width):
    """At a megapixel, as it is; images of two shapes in one call."""
    x = torch.randn(
        2, *policy.latent_shape(Size(height, width)), generator=torch.Generator().manual_seed(0)
    )
    call = {
        "latents": x,
        "height": height,
        "width": width,
        "num_steps": 3,
        "guidance_scale": 2.5,
        "images": IMAGES,
    }
    got = policy.sample(PROMPTS, decode=False, **call)
    assert_close("latents", got, expected(pipe, x, height, width, output_type="latent"), FP32)
    assert (
        got - policy.sample(PROMPTS, decode=False, **{**call, "images": IMAGES[::-1]})
    ).norm() > 1e-3 * got.norm()
    difference = np.stack(policy.sample(PROMPTS, **call)).astype(int) - np.stack(
        expected(pipe, x, height, width)
    )
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3


def test_an_embedding_needs_no_denoiser_and_no_tiles(folder, policy):
    """What data.embedding_cache loads makes the same embedding, whatever model.vae_tiling says."""
    example = Example(PROMPTS[0], images=(np.asarray(IMAGES[0]),))
    expected = embed_one(policy, example)
    assert expected["image_tokens"].shape == (720 // 64, 1456 // 64, 16)
    part = load_policy(folder, max_sequence_length=64, parts="text")
    assert part.pipe.transformer is None and part.pipe.vae is not None
    part.pipe.vae.enable_tiling()
    for name, tensor in embed_one(part, example).items():
        assert torch.equal(tensor, expected[name]), name
    assert part.pipe.vae.use_tiling


def test_the_dry_run_counts_the_largest_image(folder):
    from tempflow.models.flux_kontext import FluxKontextPolicy

    made = FluxKontextPolicy.skeleton(str(folder), max_sequence_length=20).embed([Example("")] * 3)
    assert made["image_tokens"].shape == (3, 16, 16, 16) and made["encoder_hidden_states"].shape[
        :2
    ] == (3, 20)


def test_images_that_it_does_not_take(policy):
    x = torch.zeros(1, *policy.latent_shape(Size(128, 128)))
    call = {"latents": x, "height": 128, "width": 128, "num_steps": 1, "guidance_scale": 2.5}
    with pytest.raises(
        UserError,
        match="images: prompt 0: has no images; FluxKontext takes 1 image with a prompt",
    ):
        policy.sample("a", **call)
    with pytest.raises(UserError, match="images: prompt 0: has 2 images"):
        policy.sample("a", images=IMAGES, **call)
    with pytest.raises(
        UserError,
        match="condition image of 200 x 50 pixels is too small: .* at least 64",
    ):
        policy.sample("a", images=drawn(50, 200, 0), **call)
