"""Classifier-free guidance, for the families that have it: one forward of both halves, gradients
through both, negative prompts."""

import copy

import pytest
import torch
from family_cases import FAMILIES, FP32, GUIDED, NEGATIVES, PROMPTS, latents_for
from kernel_cases import assert_close

from tempflow.models.embeddings import EmbeddingCache

pytestmark = pytest.mark.usefixtures("small_condition_images")


@pytest.mark.parametrize("name", GUIDED)
def test_a_negative_prompt_has_a_default(family_pairs, name):
    policy, _ = family_pairs(name)
    family = FAMILIES[name]
    default, explicit = (
        family.encoded(policy, negatives=negatives) for negatives in (None, [family.negative] * 2)
    )
    for part, tensor in explicit.items():
        assert_close(part, default[part].float(), tensor.float(), FP32)


@pytest.mark.parametrize("name", GUIDED)
def test_cache_is_by_prompt_and_negative_prompt(family_pairs, name, monkeypatch):
    """A prompt with two negative prompts has two conditionings; each text is encoded once, be it
    prompt or negative."""
    policy, _ = family_pairs(name)
    family, asked, embed = FAMILIES[name], [], policy.embed

    def given(default):
        texts = (
            [PROMPTS[0], PROMPTS[0], PROMPTS[0], NEGATIVES[0]],
            [NEGATIVES[0], default, PROMPTS[1], NEGATIVES[1]],
        )
        first = family.examples(PROMPTS[:1])[0].images
        return [type(one)(one.text, one.negative, first) for one in family.examples(*texts)]

    expected = policy.encode_each(given(family.negative))
    monkeypatch.setattr(
        policy, "embed", lambda some: asked.extend(example.text for example in some) or embed(some)
    )
    cached = EmbeddingCache(policy).each(given(None))
    rows = [cached.rows([n]) for n in range(4)]
    for n, row in enumerate(rows):
        for part, tensor in row.items():
            assert_close(part, tensor.float(), expected.rows([n])[part].float(), FP32)
    text = next(
        part
        for part, tensor in rows[0].items()
        if part.startswith("negative_") and tensor.is_floating_point()
    )
    assert not torch.equal(rows[0][text], rows[1][text]) and not torch.equal(
        rows[1][text], rows[2][text]
    )
    assert sorted(asked) == sorted({*PROMPTS, *NEGATIVES, family.negative})


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5])
def test_guidance_is_one_forward(family_pairs, name, scale):
    """Or two, where the shapes of prompts and negative prompts may differ."""
    policy, _ = family_pairs(name)
    seen, size = [], FAMILIES[name].size(32, 32)

    def denoiser(*latents, **inputs):
        seen.append(len(latents[0] if latents else inputs["hidden_states"]))
        return policy.denoiser()(*latents, **inputs)

    policy.velocity(
        denoiser,
        latents_for(policy, size),
        torch.ones(2),
        FAMILIES[name].encoded(policy),
        size,
        scale,
    )
    guided = [2, 2] if policy.ragged and not policy.halves_alike else [4]
    assert seen == (guided if policy.guides(scale) else [2])
    assert [policy.guides(scale) for scale in (0.0, 1.5)] == [False, True]


@pytest.mark.parametrize("name", GUIDED)
def test_gradient_flows_through_both_halves(family_pairs, name):
    """All weights' gradients of the guided velocity, against two forwards without guidance put
    together by hand."""
    policy, _ = family_pairs(name)
    family, size = FAMILIES[name], FAMILIES[name].size(32, 32)
    denoiser = copy.deepcopy(policy.denoiser()).requires_grad_(True)
    x, sigma, target = (
        latents_for(policy, size),
        torch.tensor([0.9, 0.4]),
        latents_for(policy, size, 4)[2:],
    )

    def velocity(scale, prompts, negatives):
        return policy.velocity(
            denoiser,
            x,
            sigma,
            family.encoded(policy, texts=prompts, negatives=negatives),
            size,
            scale,
        )

    def gradient(v):
        (v - target).square().sum().backward()
        found = torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None])
        denoiser.zero_grad()
        return found

    got = gradient(velocity(4.5, PROMPTS, NEGATIVES))
    positive, negative = velocity(0.0, PROMPTS, NEGATIVES), velocity(0.0, NEGATIVES, PROMPTS)
    assert_close("gradient", got, gradient(family.combine(positive, negative, 4.5)), FP32)
    assert (got - gradient(velocity(0.0, PROMPTS, NEGATIVES))).norm() > 0.01 * got.norm()
