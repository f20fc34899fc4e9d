"""FLUX.2 [klein] distilled and [dev] against plain diffusers, and what only this family has;
[klein] base is in the table of families."""

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from engine_cases import examples
from family_cases import FP32, PROMPTS, latents_for
from kernel_cases import assert_close
from pipelines_flux2 import CHANNELS, dev_pipeline, klein_pipeline, plain_pipeline
from safetensors.torch import load_file, save_file

from tempflow.errors import UserError
from tempflow.models import check_checkpoint, index_rows, load_policy
from tempflow.models.loading import save_pipeline
from tempflow.types import Size

DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}
BUILDERS = {
    "klein-base": klein_pipeline,
    "klein": lambda folder, **scheduling: klein_pipeline(folder, is_distilled=True, **scheduling),
    "dev": dev_pipeline,
}
TEXT = 80  # tokens, where it does not matter how many
CALL = {"height": 32, "width": 96, "num_steps": 3, "decode": False}


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


@pytest.mark.parametrize("height, width", [(32, 96), (48, 48)], ids=str)
@pytest.mark.parametrize("name, scale", [("klein", 1.0), ("dev", 1.0), ("dev", 4.0)])
def test_sample_equals_the_pipeline(pairs, name, scale, height, width):
    policy, pipe = pairs(name)
    x, size = latents_for(policy, Size(height, width)), {"height": height, "width": width}
    call = {**size, "num_inference_steps": 4, "guidance_scale": scale, "max_sequence_length": TEXT}
    expected = pipe(prompt=PROMPTS, latents=x.clone(), output_type="latent", **call).images
    mine = {**size, "num_steps": 4, "guidance_scale": scale}
    got = policy.sample(PROMPTS, latents=x, decode=False, **mine)
    rows, columns = height // 8, width // 8
    assert got.dtype == torch.float32
    assert got.shape == (
        (2, rows * columns, 4 * CHANNELS) if name == "dev" else (2, CHANNELS, 2 * rows, 2 * columns)
    )
    assert_close("latents", got, expected, FP32)

    pictures, wanted = (
        policy.sample(PROMPTS, latents=x, **mine),
        pipe(prompt=PROMPTS, latents=x.clone(), **call).images,
    )
    difference = np.stack(pictures).astype(int) - np.stack(wanted)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3, (
        "a level here and there, by rounding"
    )
    assert np.stack(wanted).std() > 1, "there is something in the pictures"


@pytest.mark.parametrize("name", ["klein", "dev"])
def test_no_negative_prompts_where_guidance_is_built_in(pairs, name):
    policy, _ = pairs(name)
    with pytest.raises(UserError, match="negative_prompts: .* takes none"):
        policy.sample(
            PROMPTS,
            latents=latents_for(policy, Size(32, 96)),
            guidance_scale=1.0,
            negative_prompts="",
            **CALL,
        )


def test_a_text_that_the_system_message_fills_is_refused(folders):
    """Every prompt would be the same one."""
    policy = load_policy(folders("dev"), max_sequence_length=32)
    with pytest.raises(UserError, match=r"max_sequence_length: 32; FLUX.2 \[dev\] needs \d\d at"):
        policy.sample(
            PROMPTS, latents=latents_for(policy, Size(32, 96)), guidance_scale=4.0, **CALL
        )


def test_a_distilled_model_says_that_guidance_has_no_effect(pairs):
    policy, _ = pairs("klein")
    x = latents_for(policy, Size(32, 96))
    with pytest.warns(UserWarning, match="guidance_scale: 4 has no effect"):
        got = policy.sample(PROMPTS, latents=x, guidance_scale=4.0, **CALL)
    assert torch.equal(got, policy.sample(PROMPTS, latents=x, guidance_scale=1.0, **CALL))


@pytest.mark.parametrize("name, scale", [("klein", 1.0), ("dev", 4.0)])
def test_rows_may_be_at_different_steps(pairs, name, scale):
    """One forward of rows at their own sigmas is each row's forward, and every row has its
    prompt."""
    policy, _ = pairs(name)
    conditioning = index_rows(policy.encode(examples(PROMPTS)), [0, 1, 1])
    x, sigma, call = (
        latents_for(policy, Size(32, 96), 3),
        torch.tensor([1.0, 0.55, 0.1]),
        (Size(32, 96), scale),
    )
    with torch.no_grad():
        together = policy.velocity(policy.transformer, x, sigma, conditioning, *call)
        assert together.shape == x.shape
        for i in range(3):
            alone = policy.velocity(
                policy.transformer,
                x[i : i + 1],
                sigma[i : i + 1],
                index_rows(conditioning, [i]),
                *call,
            )
            assert_close(f"row {i}", together[i : i + 1], alone, FP32)
        swapped = policy.velocity(
            policy.transformer, x, sigma, index_rows(conditioning, [1, 0, 0]), *call
        )
    assert (
        (swapped - together).flatten(1).norm(dim=1) > 1e-4 * together.flatten(1).norm(dim=1)
    ).all()


@pytest.mark.parametrize("name", BUILDERS)
def test_embeddings_are_of_one_prompt(pairs, name):
    """Each alike alone and among others, and by default as long as the pipeline makes them."""
    policy, pipe = pairs(name)
    together = policy.encode(examples(PROMPTS))
    parts = ("encoder_hidden_states", "negative_encoder_hidden_states")[
        : 1 + (name == "klein-base")
    ]
    assert {part: tensor.shape for part, tensor in together.items()} == dict.fromkeys(
        parts, (2, TEXT, 48)
    )
    assert policy.empty_embeddings(2)["encoder_hidden_states"].shape == (2, TEXT, 48)
    for i, prompt in enumerate(PROMPTS):
        for part, tensor in policy.encode(examples([prompt])).items():
            assert_close(part, tensor, together[part][i : i + 1], FP32)
    expected, _ = pipe.encode_prompt(PROMPTS)
    assert torch.equal(
        load_policy(pipe.config["_name_or_path"]).embed(examples(PROMPTS))["encoder_hidden_states"],
        expected,
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_grid_depends_on_size_and_steps(pairs, name):
    policy, _ = pairs(name)
    for steps in (2, 4, 28):
        sigmas = policy.sigmas(steps, Size(32, 96))
        assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert not torch.equal(policy.sigmas(4, Size(32, 32)), policy.sigmas(4, Size(128, 128)))
    four, eight = policy.sigmas(4, Size(32, 96)), policy.sigmas(8, Size(32, 96))
    assert not torch.isclose(four[1], eight[2], rtol=1e-4), "the same sigma before shifting"


def test_a_folder_says_which_klein_it_is(folders, pairs, tmp_path):
    """Also without weights, and to a pipeline that is written from it."""
    from tempflow.models import family_of

    kinds = {name: type(pairs(name)[0]).__name__ for name in BUILDERS}
    assert kinds == {
        "klein-base": "Flux2KleinBasePolicy",
        "klein": "Flux2KleinPolicy",
        "dev": "Flux2Policy",
    }
    for name, kind in kinds.items():
        assert family_of(str(folders(name))).__name__ == kind
        assert type(family_of(str(folders(name))).skeleton(str(folders(name)))).__name__ == kind
    save_pipeline(load_policy(folders("klein")), tmp_path / "written")
    assert plain_pipeline(tmp_path / "written").config.is_distilled is True


def test_a_written_pipeline_keeps_its_processor(folders, tmp_path):
    """Its files and its place in the index, though the tokenizer alone was loaded."""
    save_pipeline(load_policy(folders("dev")), tmp_path / "written")
    names = {file.name for file in (folders("dev") / "tokenizer").iterdir()}
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert {file.name for file in (tmp_path / "written/tokenizer").iterdir()} == names
    assert json.loads((tmp_path / "written/model_index.json").read_text())["tokenizer"] == [
        "transformers",
        "PixtralProcessor",
    ]
    check_checkpoint(tmp_path / "written")


def test_a_vae_without_its_statistics_is_refused(folders, tmp_path):
    """Its class would take means of 0 and variances of 1."""
    folder = shutil.copytree(folders("klein"), tmp_path / "model")
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if name != "bn.running_var"}, file
    )
    with pytest.raises(UserError, match="model.path: vae: .* lacks bn.running_var"):
        check_checkpoint(folder)


def test_a_damaged_processor_is_named(folders, tmp_path):
    folder = shutil.copytree(folders("dev"), tmp_path / "model")
    (folder / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="model.path: tokenizer: .*tokenizer.json is damaged"):
        check_checkpoint(folder)
