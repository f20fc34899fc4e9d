"""Policies against plain diffusers: the same latents and pictures, and one message for each bad
input."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from engine_cases import MODEL, examples
from kernel_cases import assert_close

from tempflow.errors import UserError
from tempflow.models import Policy, check_model, index_rows, load_denoiser, load_policy
from tempflow.models.embeddings import EmbeddingCache
from tempflow.types import Size

FP32 = 1e-5
PROMPTS = [
    'the word "ABC"',
    'the word "HELLO"',
    "something else, and rather longer than the others",
]
SIZES = [(32, 96), (48, 16)]
CALLS = {  # kind of pipeline: guidance_scale
    "plain": 0.0,
    "guidance": 3.5,
    "shifted": 0.0,
    "dynamic": 2.0,
}


@pytest.fixture(scope="module")
def pairs(pipelines):
    """A policy, and diffusers' own pipeline loaded apart, of each random kind and of the shipped
    model."""
    from diffusers import FluxPipeline

    made = {}

    def get(kind):
        if kind not in made:
            folder = MODEL if kind == "shipped" else pipelines[kind]
            pipe = FluxPipeline.from_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            made[kind] = load_policy(str(folder)), pipe
        return made[kind]

    return get


def latents_for(policy, height, width, seed=0):
    shape = policy.latent_shape(Size(height, width))
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(seed))


def arguments(height, width, scale):
    return {"height": height, "width": width, "guidance_scale": scale}


@pytest.mark.parametrize("height, width", SIZES, ids=str)
@pytest.mark.parametrize("kind", [*CALLS, "shipped"])
def test_sample_equals_the_pipeline(pairs, kind, height, width):
    policy, pipe = pairs(kind)
    x, call = latents_for(policy, height, width), arguments(height, width, CALLS.get(kind, 0.0))
    expected = pipe(
        PROMPTS, latents=x.clone(), num_inference_steps=5, output_type="latent", **call
    ).images
    got = policy.sample(PROMPTS, latents=x, num_steps=5, decode=False, **call)
    assert got.dtype == torch.float32
    assert_close("latents", got, expected, FP32)
    assert (got - x).norm() > 0.1 * x.norm(), "the model does something"

    pictures = policy.sample(PROMPTS, latents=x, num_steps=5, **call)
    wanted = pipe(PROMPTS, latents=x.clone(), num_inference_steps=5, **call).images
    assert [p.size for p in pictures] == [(width, height)] * len(PROMPTS)
    difference = np.stack(pictures).astype(int) - np.stack(wanted)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3, (
        "a level here and there, by rounding"
    )


def test_what_the_variants_change_matters(pairs):
    """Otherwise agreeing with the pipeline on them would say little."""
    policy, _ = pairs("dynamic")
    x = latents_for(policy, 32, 96)

    def sample(**changes):
        call = {**arguments(32, 96, 2.0), "num_steps": 4, **changes}
        return policy.sample(PROMPTS, latents=x, decode=False, **call)

    base = sample()
    assert (sample(guidance_scale=5.0) - base).norm() > 1e-3 * base.norm()
    assert (sample(num_steps=5) - base).norm() > 1e-3 * base.norm()
    plain, _ = pairs("plain")
    assert torch.allclose(plain.sigmas(4, Size(32, 96)), torch.linspace(1, 0, 5))
    assert not torch.allclose(
        policy.sigmas(4, Size(32, 96)), policy.sigmas(4, Size(128, 128)), rtol=1e-3
    )
    assert (base[0] - base[1]).norm() > 0.1


def test_text_length_is_the_pipelines(pairs, pipelines):
    """The default is the pipeline's own; another one is passed on."""
    _, pipe = pairs("plain")
    policy = load_policy(str(pipelines["plain"]), max_sequence_length=20)
    x, call = latents_for(policy, 32, 32), arguments(32, 32, 0.0)
    expected = pipe(
        PROMPTS,
        latents=x.clone(),
        num_inference_steps=2,
        output_type="latent",
        max_sequence_length=20,
        **call,
    )
    got = policy.sample(PROMPTS, latents=x, num_steps=2, decode=False, **call)
    assert_close("latents", got, expected.images, FP32)
    assert policy.encode(examples(PROMPTS))["encoder_hidden_states"].shape[1] == 20
    assert pairs("plain")[0].encode(examples(PROMPTS))["encoder_hidden_states"].shape[1] == 512


def test_rows_may_be_at_different_steps(policy):
    """One forward of rows at their own sigmas is each row's forward."""
    conditioning = policy.encode(examples(PROMPTS))
    x, sigma = latents_for(policy, 32, 96), torch.tensor([1.0, 0.55, 0.1])
    call = Size(32, 96), 0.0
    with torch.no_grad():
        together = policy.velocity(policy.transformer, x, sigma, conditioning, *call)
        for i in range(3):
            alone = policy.velocity(
                policy.transformer,
                x[i : i + 1],
                sigma[i : i + 1],
                index_rows(conditioning, [i]),
                *call,
            )
            assert_close(f"row {i}", together[i : i + 1], alone, FP32)


@pytest.mark.parametrize("kind", ["plain", "shifted", "guidance", "dynamic"])
def test_grid_falls_from_one_to_zero(pairs, kind):
    policy, _ = pairs(kind)
    for steps in (2, 10, 28):
        sigmas = policy.sigmas(steps, Size(32, 96))
        assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_frozen_and_in_evaluation_mode(policy):
    modules = [
        policy.pipe.text_encoder,
        policy.pipe.text_encoder_2,
        policy.pipe.vae,
        policy.transformer,
    ]
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(module.training for module in modules)


def test_load_denoiser_is_another_copy_of_the_same_weights(policy):
    copy = load_denoiser(str(MODEL), torch.bfloat16)
    own = dict(policy.transformer.named_parameters())
    for name, parameter in copy.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.data_ptr() != own[name].data_ptr()
        assert torch.equal(parameter, own[name].bfloat16())


@pytest.mark.parametrize(
    "name, dtype",
    [("bfloat16", torch.bfloat16), ("float16", torch.float16), (torch.float32, torch.float32)],
)
def test_dtype(pipelines, name, dtype):
    policy = load_policy(str(pipelines["plain"]), dtype=name)
    assert policy.dtype == dtype
    assert policy.encode(examples(PROMPTS))["encoder_hidden_states"].dtype == dtype
    if dtype != torch.float16:  # what a CPU may lack
        x = latents_for(policy, 32, 32)
        assert (
            policy.sample(
                PROMPTS, latents=x, num_steps=2, decode=False, **arguments(32, 32, 0.0)
            ).dtype
            == torch.float32
        )


# --------------------------------------------------------------------------------------- embeddings
class CountingPolicy:
    """Encodes a prompt as its length, and writes down what it was asked for."""

    device = torch.device("cpu")
    identity, opposed = Policy.identity, Policy.opposed

    def __init__(self):
        self.asked = []

    def embed(self, given):
        texts = [example.text for example in given]
        self.asked += texts
        return {"length": torch.tensor([[float(len(text))] for text in texts])}


def test_embeddings_are_computed_once():
    policy = CountingPolicy()
    cache = EmbeddingCache(policy)
    assert cache.get(examples(["a", "bb", "a"]))["length"].tolist() == [[1], [2], [1]]
    assert cache.get(examples(["ccc", "bb"]))["length"].tolist() == [[3], [2]]
    assert policy.asked == ["a", "bb", "ccc"]


def test_embeddings_forget_the_least_recently_used():
    policy = CountingPolicy()
    cache = EmbeddingCache(policy, capacity=2)
    for prompts in (["a", "bb"], ["a"], ["ccc"], ["a"], ["bb"]):
        cache.get(examples(prompts))
    assert policy.asked == ["a", "bb", "ccc", "bb"]
    assert cache.get(examples(list("vwxyz")))["length"].shape == (
        5,
        1,
    ), "more prompts at once than are kept"


# ------------------------------------------------------------------------------------------- errors
def refused(words, call, *args, kind=UserError, **kwargs):
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("part", ["vae", "transformer", "tokenizer_2", "scheduler"])
def test_missing_component_is_named(skeleton, part):
    assert check_model(str(skeleton)) == "FluxPipeline"
    shutil.rmtree(skeleton / part)
    for call in (check_model, load_policy):
        refused(["model.path", str(skeleton), part], call, str(skeleton))


def test_two_missing_components_are_named(skeleton):
    for part in ("vae", "text_encoder"):
        shutil.rmtree(skeleton / part)
    refused(["components", "vae", "text_encoder"], check_model, str(skeleton))


def test_unknown_family_lists_the_known(skeleton):
    index = json.loads((skeleton / "model_index.json").read_text())
    (skeleton / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "CogViewPipeline"})
    )
    refused(["model.path", "CogViewPipeline", "FluxPipeline"], check_model, str(skeleton))


@pytest.mark.parametrize("text", ["", "{", "[]", '"FluxPipeline"', "\xff"])
def test_damaged_index_is_named(skeleton, text):
    (skeleton / "model_index.json").write_bytes(text.encode("latin-1"))
    refused(["model.path", "model_index.json"], check_model, str(skeleton))


def test_folders_that_are_no_model(tmp_path):
    refused(["model.path", "model_index.json"], check_model, str(tmp_path))
    refused(["model.path", "does not exist"], check_model, str(tmp_path / "nowhere"))
    refused(["model.path", "does not exist"], check_model, "nowhere")


def test_hub_id_that_cannot_be_had():
    refused(
        ["model.path", "no-such-owner/no-such-model"], check_model, "no-such-owner/no-such-model"
    )


def test_weights_that_are_missing(skeleton):
    refused(["model.path", str(skeleton)], load_policy, str(skeleton))


@pytest.mark.parametrize("height, width", [(30, 96), (32, 100), (33, 97)])
def test_impossible_size(policy, height, width):
    for call in (policy.latent_shape, partial(policy.sigmas, 4)):
        refused(
            ["rollout.height", "rollout.width", f"{height} x {width}", "multiples of 8"],
            call,
            Size(height, width),
        )


def test_sample_refuses_what_does_not_fit(policy):
    x = latents_for(policy, 32, 96)
    call = {"num_steps": 2, "guidance_scale": 0.0, "height": 32, "width": 96}
    refused(
        ["latents", "(2, 48, 32)", "(3, 48, 32)"],
        policy.sample,
        PROMPTS[:2],
        latents=x,
        kind=ValueError,
        **call,
    )
    refused(
        ["latents", "(3, 24, 32)"],
        policy.sample,
        PROMPTS,
        latents=x,
        kind=ValueError,
        **{**call, "width": 48},
    )
    refused(
        ["negative_prompts"], policy.sample, PROMPTS, latents=x, negative_prompts=[""] * 3, **call
    )


def sample_arguments(policy, **changes):
    return {
        "prompts": PROMPTS,
        "latents": latents_for(policy, 32, 96),
        "height": 32,
        "width": 96,
        "num_steps": 2,
        "guidance_scale": 0.0,
        **changes,
    }


SAMPLE = {
    "prompts": (
        [],
        None,
        3,
        b"bytes",
        {"a": 1},
        ["a", "b", 3],
        ["a", None, "b"],
        [["a"], ["b"], ["c"]],
        ["a", "b", "half \ud83d"],
        ["one too few"],
        "one",
    ),
    "latents": (
        None,
        0,
        [1.0],
        np.zeros((3, 48, 32), np.float32),
        torch.zeros(3, 48, 32, dtype=torch.int64),
        torch.zeros(3, 48),
        torch.zeros(3, 48, 32, dtype=torch.complex64),
        torch.full((3, 48, 32), float("nan")),
        torch.full((3, 48, 32), -torch.inf),
        torch.zeros(3, 48, 32, device="meta"),
        torch.zeros(3, 48, 32).to_sparse(),
    ),
    "num_steps": (1001, 10**30, 0, -1, 2.0, "4", None, True, float("nan")),
    "height": (0, -32, 33, 32.0, "32", None),
    "width": (0, -8, 100, 96.5, False),
    "guidance_scale": (float("nan"), float("inf"), -float("inf"), 10**400, "3.5", None, 1j, True),
    "negative_prompts": (["a"], [], 3, ["a", "b", None]),
}


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name, values in SAMPLE.items() for value in values],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_sample_names_the_argument(policy, monkeypatch, name, value):
    """Before anything is encoded. A wrong count of prompts is one of latents, whose shape is
    told."""
    monkeypatch.setattr(policy, "embed", lambda texts: pytest.fail("encoded"))
    few = name == "prompts" and value in ("one", ["one too few"])
    refused(
        ["latents" if few else name],
        policy.sample,
        kind=(ValueError, UserError),
        **sample_arguments(policy, **{name: value}),
    )


def test_one_text_is_one_prompt(policy):
    """As in diffusers. A tuple is as good as a list, and what numpy makes of numbers as good as
    Python's."""
    x = latents_for(policy, 32, 96)[:1]
    call = {
        "latents": x,
        "height": 32,
        "width": 96,
        "num_steps": 2,
        "guidance_scale": 0.0,
        "decode": False,
    }
    expected = policy.sample(PROMPTS[:1], **call)
    assert torch.equal(policy.sample(PROMPTS[0], **call), expected)
    others = {
        "latents": x.double(),
        "height": np.int64(32),
        "num_steps": np.int32(2),
        "guidance_scale": np.float32(0),
    }
    assert torch.equal(policy.sample(tuple(PROMPTS[:1]), **{**call, **others}), expected)


LOADED = {
    "dtype": (
        "fp16",
        "bf16",
        "half",
        "",
        "float64",
        None,
        16,
        torch.float64,
        torch.int8,
        torch.float8_e4m3fn,
    ),
    "device": ("gpu", "cuda:99", "cuda:-1", "tpu", "", None, 1.5, "cpu:x", "meta"),
    "max_sequence_length": (0, -5, 2.0, "20", True, 10**12),
    "parts": ("images", "", None, 1),
    "path": (None, "", 3, b"folder"),
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in LOADED.items() for value in values], ids=repr
)
def test_load_policy_names_the_argument(monkeypatch, name, value):
    from tempflow.models.component import Component

    monkeypatch.setattr(Component, "load", lambda *args: pytest.fail("loaded"))
    allowed = {"dtype": ["'bfloat16'", "'auto'"], "device": ["cpu"], "parts": ["'text'"]}.get(
        name, []
    )
    refused(
        [name, *allowed],
        load_policy,
        kind=(ValueError, UserError),
        **{"path": str(MODEL), name: value},
    )
