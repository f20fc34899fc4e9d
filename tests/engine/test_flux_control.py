"""What only FLUX.1 Depth and Canny have: a control image, scaled to the output, of whose latents
the mode is taken."""

import os
import re

import numpy as np
import pytest
import torch
from engine_cases import ROOT, small_config
from family_cases import FAMILIES, PROMPTS, latents_for
from kernel_cases import assert_close

import depth_maps
from tempflow.data.prompts import load_prompts
from tempflow.errors import UserError
from tempflow.estimate import estimate
from tempflow.media import condition_image
from tempflow.models.embeddings import store_of
from tempflow.models.flux_control import CONTROL
from tempflow.types import Example, Size

FAMILY, SIZE = FAMILIES["flux_control"], Size(32, 96)


def test_it_takes_the_mode_of_what_the_pipeline_draws(family_pairs):
    """The pipeline's control latents, drawn often, have it for their mean; the draws differ."""
    policy, pipe = family_pairs("flux_control")
    images, seen = FAMILY.images(SIZE), []
    with policy.embedding_for(SIZE):
        mode = policy.embed(FAMILY.examples(size=SIZE))[CONTROL]
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    call = {
        "height": 32,
        "width": 96,
        "num_inference_steps": 1,
        "output_type": "latent",
        **FAMILY.given(images),
    }
    for seed in range(20):
        pipe(
            PROMPTS,
            latents=latents_for(policy, SIZE),
            generator=torch.Generator().manual_seed(seed),
            **call,
        )
    pipe.transformer._forward_pre_hooks.clear()
    drawn = torch.stack(seen)[..., mode.shape[-1] :]
    spread = drawn.std(0).square().mean().sqrt()
    assert spread > 1e-3
    assert (drawn.mean(0) - mode).square().mean().sqrt() < 2 * spread / 20**0.5


def test_embeddings_are_of_one_output_size(family_pairs, family_folders, tmp_path):
    policy, _ = family_pairs("flux_control")
    example, *_ = FAMILY.examples(size=SIZE)
    tokens = {}
    for size in (SIZE, Size(16, 16)):
        with policy.embedding_for(size):
            tokens[size] = policy.embed([example])[CONTROL].shape
            assert (
                policy.empty_embeddings(1)[CONTROL].shape
                == tokens[size]
                == (1, *policy.latent_shape(size))
            )
    assert policy.size is None and tokens[SIZE] != tokens[Size(16, 16)]
    stores = [
        store_of(
            small_config(
                model={"path": str(folder)},
                data={"embedding_cache": str(tmp_path)},
                rollout={"height": size.height, "width": size.width},
            ),
            "cpu",
        )
        for folder in (family_folders("flux_control"), family_folders("flux"))
        for size in tokens
    ]
    files = [store.path(("a prompt",)) for store in stores]
    assert files[0] != files[1] and files[2] == files[3], "text alone does not depend on the size"


def test_control_stands_beside_the_latents(family_pairs):
    """In the second half of the channels, in the order of the latents' own packing: control equal
    to the latents doubles them."""
    policy, _ = family_pairs("flux_control")
    seen, x = [], latents_for(policy, SIZE)
    conditioning = FAMILY.encoded(policy, size=SIZE) | {CONTROL: x}

    def transformer(**inputs):
        seen.append(inputs["hidden_states"])
        return (inputs["hidden_states"],)

    policy.velocity(transformer, x, torch.ones(2), conditioning, SIZE, 3.0)
    assert torch.equal(seen[0], torch.cat([x, x], dim=2))
    vae, image = policy.pipe.vae, FAMILY.examples(size=SIZE)[0]
    with policy.embedding_for(SIZE), torch.no_grad():
        packed = policy.embed([image])[CONTROL]
        pixels = policy.pipe.image_processor.preprocess(condition_image(image.images[0]), 32, 96)
        wanted = (
            vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor
        ) * vae.config.scaling_factor
    assert_close(
        "latents",
        policy.pipe._unpack_latents(packed, 32, 96, policy.pipe.vae_scale_factor),
        wanted,
        1e-6,
    )


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_images_is_refused(family_pairs, count):
    policy, _ = family_pairs("flux_control")
    given = "no images" if count == 0 else "2 images"
    call = {"height": 32, "width": 96, "num_steps": 1, "guidance_scale": 1.0}
    with pytest.raises(
        UserError,
        match=f"images: prompt 0: has {given}; FluxControl takes 1 image with a prompt",
    ):
        policy.sample(
            PROMPTS,
            latents=latents_for(policy, SIZE),
            images=[[FAMILY.images(SIZE)[0][0]] * count] * 2,
            **call,
        )


def test_an_image_that_cannot_be_read_is_named(family_pairs, tmp_path):
    policy, _ = family_pairs("flux_control")
    (tmp_path / "depth.png").write_bytes(b"not an image")
    with (
        policy.embedding_for(SIZE),
        pytest.raises(UserError, match=re.escape(str(tmp_path / "depth.png"))),
    ):
        policy.embed([Example("a", images=(tmp_path / "depth.png",))])


def test_the_card_and_the_shipped_config():
    """FLUX.1-dev's transformer, as its card has it, with 64 more input channels."""
    from tempflow.config import load_config

    found = estimate(load_config(ROOT / "configs/flux_control_lora.json", ["model.lora=null"]))
    assert found.parameters == 11_901_408_320 + 64 * 3072
    assert estimate(load_config(ROOT / "configs/flux_control_lora.json")).fits


def test_the_shipped_depth_maps():
    """They are what the recipe draws and writes, no scene in both files."""
    for key, split in (("data.train", "train"), ("data.heldout", "test")):
        prompts = load_prompts(depth_maps.FOLDER, key)
        assert [
            {"prompt": p.text, "image": os.path.basename(p.images[0])} for p in prompts
        ] == depth_maps.lines(split)
        for prompt in prompts:
            name = os.path.basename(prompt.images[0]).removesuffix(".png")
            image = np.asarray(condition_image(prompt.images[0]))
            assert (
                np.array_equal(image, np.asarray(depth_maps.draw(name)))
                and len(np.unique(image)) > 50
            )
