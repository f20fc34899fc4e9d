"""Every family against plain diffusers: latents, images and grids; rows, conditioning and its
cache."""

from functools import partial

import numpy as np
import pytest
import torch
from family_cases import FAMILIES, FP32, NEGATIVES, PROMPTS, latents_for
from kernel_cases import assert_close

from tempflow.errors import UserError
from tempflow.models import check_model, check_size, index_rows, load_policy
from tempflow.models.embeddings import EmbeddingCache

pytestmark = pytest.mark.usefixtures("small_condition_images")
KINDS = [(name, kind) for name, family in FAMILIES.items() for kind in family.schedulers]
CASES = [
    (name, kind, case, *size)
    for name, kind in KINDS
    for case in range(len(FAMILIES[name].cases))
    for size in FAMILIES[name].sizes
]


@pytest.mark.parametrize("name, kind, case, height, width", CASES)
def test_sample_equals_the_pipeline(family_pairs, name, kind, case, height, width):
    policy, pipe = family_pairs(name, kind)
    family, size = FAMILIES[name], FAMILIES[name].size(height, width)
    x, call = latents_for(policy, size), (size, 4, *family.cases[case])
    expected = family.reference(pipe, x, *call)
    got = family.sampled(policy, x, *call)
    assert got.dtype == torch.float32
    assert_close("latents", got, expected, FP32)
    assert got.shape != x.shape or (got - x).norm() > 0.1 * x.norm(), "the model does something"

    images = family.sampled(policy, x, *call, decode=True)
    wanted = family.reference(pipe, x, *call, decode=True)
    if family.frames > 1:
        wanted = [(np.asarray(video) * 255).round().astype(np.uint8) for video in wanted]
    wanted = [np.asarray(image)[..., :3] for image in wanted]  # an alpha channel is left out
    difference = np.stack(images).astype(int) - np.stack(wanted)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3, (
        "a level here and there, by rounding"
    )
    assert np.stack(wanted).std() > 1, "there is something in the images"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_it_is_given_matters(family_pairs, name):
    """Prompt, guidance, steps, negative prompt, images: otherwise agreeing with the pipeline on
    them would say little."""
    policy, _ = family_pairs(name)
    family, size = FAMILIES[name], FAMILIES[name].size(32, 96)
    negatives = (
        [None] if family.negative is None else [[family.negative] * 2, NEGATIVES, NEGATIVES[::-1]]
    )
    calls = [
        (3, 1.0, negatives[0]),
        (4, family.scale, negatives[0]),
        *((3, family.scale, negative) for negative in negatives),
    ]
    x = latents_for(policy, size, 1).expand(2, *policy.latent_shape(size))
    runs = [family.sampled(policy, x, size, *call) for call in calls]
    if family.images:
        runs.append(family.sampled(policy, x, size, *calls[-1], images=family.images(size)[::-1]))
    for i, one in enumerate(runs):
        assert (one[0] - one[1]).norm() > 1e-3 * one[0].norm()
        for another in runs[:i]:
            assert (one - another).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].cuts])
def test_text_length_is_the_pipelines(family_pairs, family_folders, name):
    """The default is the pipeline's own; another one is passed on, and cuts what is longer."""
    family, size = FAMILIES[name], FAMILIES[name].size(32, 32)
    assert family_pairs(name)[0].max_sequence_length == family.text_length
    policy = load_policy(str(family_folders(name)), max_sequence_length=12)
    x, call = latents_for(policy, size), (size, 2, *family.cases[-1])
    expected = family.reference(family_pairs(name)[1], x, *call, max_sequence_length=12)
    assert_close("latents", family.sampled(policy, x, *call), expected, FP32)
    with pytest.raises(
        UserError, match=f"model.max_sequence_length: 20000; {family.pipeline} takes"
    ):
        load_policy(str(family_folders(name)), max_sequence_length=20000)


@pytest.mark.parametrize("name", FAMILIES)
def test_conditioning_is_by_prompt(family_pairs, name):
    """Rows of prompts, encoded together or one at a time; the default negative prompt, kept once in
    the cache."""
    policy, _ = family_pairs(name)
    family, size, cache = FAMILIES[name], FAMILIES[name].size(32, 32), EmbeddingCache(policy)
    together = family.encoded(policy, size=size)
    assert {len(tensor) for tensor in together.values()} == {2}
    with policy.embedding_for(size):
        for i, example in enumerate(family.examples(size=size)[: 1 if policy.ragged else 2]):
            for other in (policy.encode([example]), cache.get([example])):
                assert other.keys() == together.keys()
                for part, tensor in other.items():
                    assert tensor.shape == together[part][i : i + 1].shape
                    assert_close(part, tensor.float(), together[part][i : i + 1].float(), FP32)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_may_be_at_different_steps(family_pairs, name):
    """One forward of rows at their own sigmas is each row's forward."""
    policy, _ = family_pairs(name)
    family, size = FAMILIES[name], FAMILIES[name].size(32, 96)
    conditioning = family.encoded(policy, [0, 1, 1], size)
    x, sigma = latents_for(policy, size, 3), torch.tensor([1.0, 0.55, 0.1])
    for scale in (1.0, family.scale):
        with torch.no_grad():
            together = policy.velocity(policy.denoiser(), x, sigma, conditioning, size, scale)
            assert together.shape == x.shape
            for i in range(3):
                row = index_rows(conditioning, [i])
                alone = policy.velocity(
                    policy.denoiser(), x[i : i + 1], sigma[i : i + 1], row, size, scale
                )
                assert_close(f"row {i}", together[i : i + 1], alone, FP32)


@pytest.mark.parametrize("name, kind", KINDS)
def test_grid_falls_from_one_to_zero(family_pairs, name, kind):
    policy, _ = family_pairs(name, kind)
    family = FAMILIES[name]
    for steps in (2, 10, 28):
        sigmas = policy.sigmas(steps, family.size(32, 96))
        assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    same = torch.equal(
        policy.sigmas(4, family.size(32, 32)), policy.sigmas(4, family.size(128, 128))
    )
    assert same != family.schedulers[kind].get("use_dynamic_shifting", False)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("height, width", [(30, 96), (32, 100), (33, 97)])
def test_impossible_size(family_pairs, family_folders, name, height, width):
    policy, _ = family_pairs(name)
    family, folder = FAMILIES[name], str(family_folders(name))
    assert check_model(folder) == family.pipeline
    check_size(folder, family.size(32, 96))
    for call in (policy.latent_shape, partial(policy.sigmas, 4), partial(check_size, folder)):
        with pytest.raises(
            UserError,
            match=(
                f"rollout.height, rollout.width: {height} x {width}.*; both must be multiples of "
            ),
        ):
            call(family.size(height, width))


@pytest.mark.parametrize("name", FAMILIES)
def test_sample_refuses_what_does_not_fit(family_pairs, name):
    policy, _ = family_pairs(name)
    family, x = FAMILIES[name], latents_for(policy, FAMILIES[name].size(32, 96))
    with pytest.raises((ValueError, UserError), match="negative_prompts: "):
        family.sampled(
            policy,
            x,
            family.size(32, 96),
            2,
            family.scale,
            negatives=[""] * (1 if family.negative is not None else 2),
        )
    with pytest.raises(ValueError, match="latents: expected shape"):
        family.sampled(policy, x, family.size(64, 96), 2, family.scale)
    with pytest.raises(ValueError, match="latents: expected shape"):
        policy.sample(
            PROMPTS[0], latents=x, height=32, width=96, num_steps=2, guidance_scale=family.scale
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_can_be_compiled(family_folders, name):
    """Every repeated block is marked for it; compiling itself waits for the first forward."""
    from tempflow.training.engine import compile_blocks

    denoiser = load_policy(str(family_folders(name))).denoiser()
    compile_blocks(denoiser, "compile")
    repeated = [
        module
        for module in denoiser.modules()
        if type(module).__name__ in denoiser._repeated_blocks
    ]
    assert repeated and all(block._compiled_call_impl is not None for block in repeated)
