"""The families with classifier-free guidance against plain diffusers."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from engine_cases import examples
from family_cases import FAMILIES, FP32, NEGATIVES, PROMPTS, latents_for, pipeline_folders
from kernel_cases import assert_close

from tempflow.errors import UserError
from tempflow.models import check_checkpoint, check_model, check_size, index_rows, load_policy
from tempflow.models.embeddings import EmbeddingCache
from tempflow.types import Size

SIZES = [(32, 96), (48, 48)]
KINDS = [(name, kind) for name, family in FAMILIES.items() for kind in family.schedulers]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return pipeline_folders(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def pairs(folders):
    """A policy, and diffusers' own pipeline loaded apart."""
    import diffusers

    made = {}

    def get(name, kind=None):
        if (name, kind) not in made:
            folder = folders(name, kind)
            pipe = getattr(diffusers, FAMILIES[name].pipeline).from_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            made[name, kind] = load_policy(str(folder)), pipe
        return made[name, kind]

    return get


@pytest.mark.parametrize("height, width", SIZES, ids=str)
@pytest.mark.parametrize("scale, negatives", [(0.0, None), (1.0, NEGATIVES), (4.5, None), (4.5, NEGATIVES)])
@pytest.mark.parametrize("name, kind", KINDS)
def test_sample_equals_the_pipeline(pairs, name, kind, scale, negatives, height, width):
    policy, pipe = pairs(name, kind)
    x, size = latents_for(policy, height, width), {"height": height, "width": width}
    call = {**size, "num_inference_steps": 4, **FAMILIES[name].call(scale, negatives)}
    expected = pipe(PROMPTS, latents=x.clone(), output_type="latent", **call).images
    mine = {**size, "num_steps": 4, "guidance_scale": scale, "negative_prompts": negatives}
    got = policy.sample(PROMPTS, latents=x, decode=False, **mine)
    assert got.dtype == torch.float32
    assert_close("latents", got, expected, FP32)
    assert (got - x).norm() > 0.1 * x.norm(), "the model does something"

    pictures = policy.sample(PROMPTS, latents=x, **mine)
    wanted = pipe(PROMPTS, latents=x.clone(), **call).images
    assert [p.size for p in pictures] == [(width, height)] * len(PROMPTS)
    difference = np.stack(pictures).astype(int) - np.stack(wanted)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3, "a level here and there, by rounding"
    assert np.stack(wanted).std() > 1, "there is something in the pictures"


def test_sd3_saved_without_t5(folders, tmp_path):
    """As people do who lack the memory: the pipeline fills its place with zeros."""
    import diffusers

    without = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folders("sd3"), **without)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "small")
    check_checkpoint(tmp_path / "small")
    policy = load_policy(tmp_path / "small")
    x, size = latents_for(policy, 32, 96), {"height": 32, "width": 96}
    expected = pipe(PROMPTS, latents=x.clone(), output_type="latent", num_inference_steps=2, guidance_scale=4.5, **size).images
    assert_close("latents", policy.sample(PROMPTS, latents=x, decode=False, num_steps=2, guidance_scale=4.5, **size), expected, FP32)


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_and_negative_prompts_matter(pairs, name):
    """Otherwise agreeing with the pipeline on them would say little."""
    policy, _ = pairs(name)
    call = {"latents": latents_for(policy, 32, 96), "height": 32, "width": 96, "num_steps": 3, "decode": False}
    plain, default, guided, other = (
        policy.sample(PROMPTS, guidance_scale=scale, negative_prompts=negatives, **call)
        for scale, negatives in ((1.0, NEGATIVES), (4.5, [FAMILIES[name].default_negative] * 2), (4.5, NEGATIVES), (4.5, NEGATIVES[::-1]))
    )
    runs = [plain, default, guided, other]
    for i, one in enumerate(runs):
        for another in runs[:i]:
            assert (one - another).norm() > 1e-3 * one.norm()
    assert (guided[0] - guided[1]).norm() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_text_length_is_the_pipelines(pairs, folders, name):
    """The default is the pipeline's own; another one is passed on, and cuts what is longer."""
    _, pipe = pairs(name)
    assert pairs(name)[0].max_sequence_length == FAMILIES[name].text_length
    policy = load_policy(str(folders(name)), max_sequence_length=12)
    x = latents_for(policy, 32, 32)
    expected = pipe(
        PROMPTS,
        latents=x.clone(),
        height=32,
        width=32,
        num_inference_steps=2,
        output_type="latent",
        max_sequence_length=12,
        **FAMILIES[name].call(3.0, NEGATIVES),
    )
    got = policy.sample(PROMPTS, latents=x, height=32, width=32, num_steps=2, guidance_scale=3.0, negative_prompts=NEGATIVES, decode=False)
    assert_close("latents", got, expected.images, FP32)
    with pytest.raises(UserError, match=f"model.max_sequence_length: 2000; {FAMILIES[name].pipeline} takes"):
        load_policy(str(folders(name)), max_sequence_length=2000)


def test_template_of_qwen_is_dropped(pairs):
    """What is left is the prompt and the five tokens after it; the rest is padding."""
    policy, pipe = pairs("qwen_image")
    mask = policy.encode(examples(PROMPTS))["encoder_hidden_states_mask"]
    lengths = [len(pipe.tokenizer(prompt).input_ids) + 5 for prompt in PROMPTS]
    assert mask.dtype == torch.bool and mask.shape == (2, 512)
    assert torch.equal(mask, torch.arange(512)[None] < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("name", FAMILIES)
def test_conditioning_is_by_prompt(pairs, name):
    """Rows of prompts, encoded together or one at a time; the default negative prompt, kept once in the cache."""
    policy, _ = pairs(name)
    together = policy.encode(examples(PROMPTS))
    assert {len(tensor) for tensor in together.values()} == {2}
    explicit = policy.encode(examples(PROMPTS, [FAMILIES[name].default_negative] * 2))
    cache = EmbeddingCache(policy)
    for i, prompt in enumerate(PROMPTS):
        for other in (policy.encode(examples([prompt])), index_rows(explicit, [i]), cache.get(examples([prompt]))):
            assert other.keys() == together.keys()
            for part, tensor in other.items():
                assert tensor.shape == together[part][i : i + 1].shape
                assert_close(part, tensor.float(), together[part][i : i + 1].float(), FP32)


@pytest.mark.parametrize("name", FAMILIES)
def test_cache_is_by_prompt_and_negative_prompt(pairs, name, monkeypatch):
    """A prompt with two negative prompts has two conditionings; each text is encoded once, be it prompt or negative."""
    policy, _ = pairs(name)
    default, asked, embed = FAMILIES[name].default_negative, [], policy.embed
    expected = policy.encode(examples([PROMPTS[0]] * 3 + [NEGATIVES[0]], [NEGATIVES[0], default, PROMPTS[1], NEGATIVES[1]]))
    monkeypatch.setattr(policy, "embed", lambda given: asked.extend(example.text for example in given) or embed(given))
    cache = EmbeddingCache(policy)
    got = cache.get(examples([PROMPTS[0]] * 3 + [NEGATIVES[0]], [NEGATIVES[0], None, PROMPTS[1], NEGATIVES[1]]))
    for part, tensor in got.items():
        assert_close(part, tensor.float(), expected[part].float(), FP32)
    rows = got["negative_encoder_hidden_states"]
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])
    assert sorted(asked) == sorted({*PROMPTS, *NEGATIVES, default})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_rows_may_be_at_different_steps(pairs, name, scale):
    """One forward of rows at their own sigmas is each row's forward."""
    policy, _ = pairs(name)
    conditioning = index_rows(policy.encode(examples(PROMPTS)), [0, 1, 1])
    x, sigma = latents_for(policy, 32, 96, 3), torch.tensor([1.0, 0.55, 0.1])
    call = Size(32, 96), scale
    with torch.no_grad():
        together = policy.velocity(policy.transformer, x, sigma, conditioning, *call)
        assert together.shape == x.shape
        for i in range(3):
            alone = policy.velocity(policy.transformer, x[i : i + 1], sigma[i : i + 1], index_rows(conditioning, [i]), *call)
            assert_close(f"row {i}", together[i : i + 1], alone, FP32)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scale, rows", [(0.0, 2), (1.0, 2), (1.5, 4)])
def test_guidance_is_one_forward(pairs, name, scale, rows):
    policy, _ = pairs(name)
    seen = []

    def transformer(**inputs):
        seen.append(len(inputs["hidden_states"]))
        return policy.transformer(**inputs)

    policy.velocity(transformer, latents_for(policy, 32, 32), torch.ones(2), policy.encode(examples(PROMPTS)), Size(32, 32), scale)
    assert seen == [rows]


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_flows_through_both_halves(pairs, name):
    """All weights' gradients of the guided velocity, against two forwards without guidance put together by hand."""
    policy, _ = pairs(name)
    transformer = copy.deepcopy(policy.transformer).requires_grad_(True)
    x, sigma, target = latents_for(policy, 32, 32), torch.tensor([0.9, 0.4]), latents_for(policy, 32, 32, 4)[2:]

    def velocity(scale, prompts, negatives):
        return policy.velocity(transformer, x, sigma, policy.encode(examples(prompts, negatives)), Size(32, 32), scale)

    def gradient(v):
        (v - target).square().sum().backward()
        found = torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])
        transformer.zero_grad()
        return found

    got = gradient(velocity(4.5, PROMPTS, NEGATIVES))
    positive, negative = velocity(1.0, PROMPTS, NEGATIVES), velocity(1.0, NEGATIVES, PROMPTS)
    assert_close("gradient", got, gradient(FAMILIES[name].combine(positive, negative, 4.5)), FP32)
    assert (got - gradient(velocity(1.0, PROMPTS, NEGATIVES))).norm() > 0.01 * got.norm()


@pytest.mark.parametrize("name, kind", KINDS)
def test_grid_falls_from_one_to_zero(pairs, name, kind):
    policy, _ = pairs(name, kind)
    for steps in (2, 10, 28):
        sigmas = policy.sigmas(steps, Size(32, 96))
        assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    same = torch.equal(policy.sigmas(4, Size(32, 32)), policy.sigmas(4, Size(128, 128)))
    assert same != FAMILIES[name].schedulers[kind].get("use_dynamic_shifting", False)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("height, width", [(30, 96), (32, 100), (33, 97)])
def test_impossible_size(pairs, folders, name, height, width):
    policy, _ = pairs(name)
    assert check_model(str(folders(name))) == FAMILIES[name].pipeline
    check_size(str(folders(name)), Size(32, 96))
    for call in (policy.latent_shape, partial(policy.sigmas, 4), partial(check_size, str(folders(name)))):
        with pytest.raises(UserError, match=f"rollout.height, rollout.width: {height} x {width}; both must be multiples of 8"):
            call(Size(height, width))


def test_size_beyond_the_position_embedding(pairs):
    policy, _ = pairs("sd3")
    assert policy.latent_shape(Size(128, 128)) == (8, 32, 32)
    for call in (policy.latent_shape, partial(policy.sigmas, 4)):
        with pytest.raises(UserError, match="rollout.height, rollout.width: 32 x 136; this model makes at most 128 a side"):
            call(Size(32, 136))


@pytest.mark.parametrize("name", FAMILIES)
def test_sample_refuses_what_does_not_fit(pairs, name):
    policy, _ = pairs(name)
    call = {"latents": latents_for(policy, 32, 96), "num_steps": 2, "guidance_scale": 3.0, "width": 96}
    with pytest.raises(ValueError, match="negative_prompts: 1 for 2 prompts"):
        policy.sample(PROMPTS, negative_prompts=[""], height=32, **call)
    with pytest.raises(ValueError, match="latents: expected shape"):
        policy.sample(PROMPTS, height=48, **call)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_can_be_compiled(pairs, folders, name):
    """Every repeated block is marked for it; compiling itself waits for the first forward."""
    from tempflow.training.engine import compile_blocks

    transformer = load_policy(str(folders(name))).transformer
    compile_blocks(transformer, "compile")
    assert all(block._compiled_call_impl is not None for block in transformer.transformer_blocks)


def test_an_attention_backend_is_set_or_refused(pairs):
    """Never ignored: the attention of SD3 is not among those that diffusers can switch."""
    from tempflow.models.attention import set_attention_backend

    set_attention_backend(pairs("qwen_image")[0].transformer, "native")
    with pytest.raises(UserError, match="model.attention_backend: 'native': .* SD3Transformer2DModel"):
        set_attention_backend(pairs("sd3")[0].transformer, "native")


def test_qwen_without_negative_prompts_says_that_it_does_not_guide(pairs):
    """And equals its pipeline so, as `test_sample_equals_the_pipeline` has it; what training embeds is guided."""
    policy, _ = pairs("qwen_image")
    x, call = latents_for(policy, 32, 32), {"height": 32, "width": 32, "num_steps": 2}
    with pytest.warns(UserWarning, match="guidance_scale has no effect"):
        got = policy.sample(PROMPTS, latents=x, guidance_scale=4.0, decode=False, **call)
    assert torch.equal(got, policy.at(Size(32, 32), 1.0).integrate(x, policy.encode(examples(PROMPTS)), 2))
    guided = policy.sample(PROMPTS, latents=x, guidance_scale=4.0, negative_prompts=[" "] * 2, decode=False, **call)
    again = policy.at(Size(32, 32), 4.0).integrate(x, EmbeddingCache(policy).get(examples(PROMPTS)), 2)
    assert_close("latents", again, guided, FP32)
    assert (got - guided).norm() > 1e-3 * got.norm()
