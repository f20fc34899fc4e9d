"""FLUX.2 with reference images against plain diffusers, and prompts with different numbers and
sizes of them."""

from functools import cache

import numpy as np
import pytest
import torch
from engine_cases import ROOT, small_config
from family_cases import DYNAMIC, FP32, NEGATIVES, PROMPTS, latents_for
from kernel_cases import assert_close
from PIL import Image
from pipelines_flux2 import CHANNELS, dev_pipeline, klein_pipeline, plain_pipeline

from tempflow.config import load_config
from tempflow.errors import UserError
from tempflow.models import family_of, load_policy, most_images
from tempflow.models.embeddings import EmbeddingCache
from tempflow.models.flux2 import AREA
from tempflow.training.shares import check_shares
from tempflow.types import Example, Size

BUILDERS = {
    "klein-base": klein_pipeline,
    "klein": lambda folder, **scheduling: klein_pipeline(folder, is_distilled=True, **scheduling),
    "dev": dev_pipeline,
}
SCALES = {"klein-base": 4.0, "klein": 1.0, "dev": 4.0}
TEXT = 80
ADAM = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}
ZERO3 = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "optimizer": ADAM}
CALL = {"height": 32, "width": 48, "num_steps": 2, "decode": False}


def picture(width, height, seed):
    """Colored noise."""
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    )


# cropped to tokens of 8 pixels a side
WIDE, TALL, OTHER = (picture(102, 66, 0), picture(64, 81, 1), picture(102, 66, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda name: BUILDERS[name](tmp_path_factory.mktemp("flux2") / name, **DYNAMIC))


@pytest.fixture(scope="module")
def pairs(folders):
    """A policy, and diffusers' own pipeline loaded apart."""
    return cache(
        lambda name: (
            load_policy(folders(name), max_sequence_length=TEXT),
            plain_pipeline(folders(name)),
        )
    )


def reference(pipe, prompt, images, latents, scale, **more):
    call = {
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "guidance_scale": scale,
        "max_sequence_length": TEXT,
        **more,
    }
    return pipe(
        prompt=[prompt], image=images, latents=latents.clone(), output_type="latent", **call
    ).images


@pytest.mark.parametrize("name", BUILDERS)
def test_samples_of_one_and_two_images_equal_the_pipelines(pairs, name):
    """Each prompt with images of its own, of another number and other sizes, in one call; and a
    prompt without any."""
    policy, pipe = pairs(name)
    prompts, images = [*PROMPTS, PROMPTS[0]], [WIDE, [TALL, WIDE], []]
    x = latents_for(policy, Size(32, 48), 3)
    got = policy.sample(prompts, latents=x, images=images, guidance_scale=SCALES[name], **CALL)
    for i, given in enumerate([[WIDE], [TALL, WIDE], None]):
        assert_close(
            f"prompt {i}",
            got[i : i + 1],
            reference(pipe, prompts[i], given, x[i : i + 1], SCALES[name]),
            FP32,
        )
    other = policy.sample(
        prompts, latents=x, images=[OTHER, [WIDE, TALL], []], guidance_scale=SCALES[name], **CALL
    )
    changed = (got - other).flatten(1).norm(dim=1) / got.flatten(1).norm(dim=1)
    assert (changed[:2] > 1e-4).all() and changed[2] == 0, "images matter, and so does their order"


def test_another_size_and_decoded(pairs):
    policy, pipe = pairs("klein-base")
    x, call = latents_for(policy, Size(64, 32), 1), {"height": 64, "width": 32}
    expected = reference(pipe, PROMPTS[0], [WIDE], x, 4.0, **call)
    mine = {**CALL, **call, "guidance_scale": 4.0, "images": [WIDE]}
    assert_close("latents", policy.sample(PROMPTS[:1], latents=x, **mine), expected, FP32)
    wanted = pipe(
        prompt=PROMPTS[:1],
        image=WIDE,
        latents=x,
        num_inference_steps=2,
        max_sequence_length=TEXT,
        **call,
    ).images[0]
    (got,) = policy.sample(PROMPTS[:1], latents=x, **{**mine, "decode": True})
    assert np.abs(np.asarray(got).astype(int) - np.asarray(wanted)).max() <= 1 and got.size == (
        32,
        64,
    )


def test_negative_prompts_see_the_images_too(pairs):
    policy, pipe = pairs("klein-base")
    x = latents_for(policy, Size(32, 48), 1)
    given, _ = pipe.encode_prompt(NEGATIVES[:1], max_sequence_length=TEXT)
    expected = reference(pipe, PROMPTS[0], [TALL], x, 4.0, negative_prompt_embeds=given)
    got = policy.sample(
        PROMPTS[:1],
        latents=x,
        images=[TALL],
        negative_prompts=NEGATIVES[:1],
        guidance_scale=4.0,
        **CALL,
    )
    assert_close("latents", got, expected, FP32)


def test_large_images_are_scaled_down(pairs, monkeypatch):
    """To the area that diffusers takes, made smaller here on both sides."""
    import tempflow.models.flux2 as flux2

    policy, pipe = pairs("klein")
    large = picture(300, 150, 3)
    monkeypatch.setattr(flux2, "AREA", 90 * 90)
    tokens = policy.embed([Example(PROMPTS[0], images=(np.asarray(large),))])["image_0"]
    small = pipe.image_processor._resize_to_target_area(large, 90 * 90)
    assert small.size == (127, 63) and tokens.shape == (1, 7, 15, 4 * CHANNELS)
    expected, _ = pipe.prepare_image_latents(
        [pipe.image_processor.preprocess(small, height=60, width=124, resize_mode="crop")],
        1,
        None,
        "cpu",
        torch.float32,
    )
    assert_close("tokens", tokens.flatten(1, 2), expected, FP32)


@pytest.mark.parametrize(
    "image, message",
    [
        (picture(63, 80, 0), "Image too small"),
        (picture(64, 600, 0), "Aspect ratio too extreme"),
        (None, "images; Flux2Klein"),
    ],
)
def test_images_that_the_pipeline_refuses(pairs, tmp_path, image, message):
    """By their headers, before anything is embedded: arrays and files."""
    policy, _ = pairs("klein")
    given = [WIDE] * 11 if image is None else [image]
    with pytest.raises(UserError, match=f"images: prompt 0: .*{message}"):
        policy.sample(
            PROMPTS[0],
            latents=latents_for(policy, Size(32, 48), 1),
            images=given,
            guidance_scale=1.0,
            **CALL,
        )
    if image is not None:
        image.save(tmp_path / "image.png")
        with pytest.raises(UserError, match=f"words.jsonl:3: .*{message}"):
            policy.check_images(Example("a", images=(tmp_path / "image.png",)), "words.jsonl:3")


def test_the_cache_keeps_shapes_apart(pairs):
    """What training embeds is what `sample` does, rows of each shape together."""
    policy, _ = pairs("klein-base")
    texts, images = [*PROMPTS, "c"], [[WIDE], [], [OTHER]]
    examples = [
        Example(text, images=tuple(map(np.asarray, given)))
        for text, given in zip(texts, images, strict=True)
    ]
    conditions = EmbeddingCache(policy).each(examples)
    assert conditions.shapes[0] == conditions.shapes[2] != conditions.shapes[1]
    rows = conditions.rows([0, 2])
    assert rows["image_0"].shape == rows["negative_image_0"].shape == (2, 8, 12, 4 * CHANNELS)
    x = latents_for(policy, Size(32, 48), 3)
    got = policy.at(Size(32, 48), 4.0).integrate_each(x, conditions, 2)
    wanted = policy.sample(texts, latents=x, images=images, guidance_scale=4.0, **CALL)
    assert_close("latents", policy.finished(got), wanted, FP32)


def test_a_run_without_images_has_one_shape(folders, monkeypatch):
    """So it batches as other families do; the dry run counts images where there are some, and
    sharded rollouts are refused then."""
    from tempflow.models.opened import open_model
    from tempflow.training import distributed

    path, with_image = str(folders("klein-base")), Example("a", images=(np.asarray(WIDE),))
    config = small_config(
        model={"path": path, "max_sequence_length": TEXT},
        rollout={"replica": False},
        deepspeed=ZERO3,
    )
    for examples, ragged in (
        ([Example("a"), Example("b")], False),
        ([Example("a"), with_image], True),
    ):
        assert open_model(config, examples).policy.ragged is ragged
        described = family_of(path).skeleton(path, images=most_images(examples))
        assert described.ragged is ragged and len(described.embed(examples[:1])) == 1 + ragged
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        if ragged:
            with pytest.raises(UserError, match="prompts of this model differ in shape"):
                check_shares(config, examples, [])
        else:
            check_shares(config, examples, [])
        monkeypatch.undo()
    assert (
        described.embed([with_image])["image_0"].shape == (1, 128, 128, 4 * CHANNELS)
        and AREA == 8**2 * 128**2
    )


def test_the_dry_run_counts_reference_images():
    from tempflow.estimate import estimate

    config = load_config(ROOT / "configs/flux2_klein_lora.json")
    none, one = (estimate(config, card_gb=48, images=images) for images in range(2))
    assert 2 * none.phase("rollout").flops < one.phase("rollout").flops and none.total < one.total
