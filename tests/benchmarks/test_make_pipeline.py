"""Pipelines of real shapes with random weights: they load as any checkpoint does, and FLUX's config
trains one."""

import json

import pytest
import torch
from engine_cases import ROOT, examples
from make_pipeline import VOCABULARY, make_pipeline, shrunk, write_tokenizer
from run_cases import Run, ranks

from tempflow.errors import UserError
from tempflow.models import load_policy
from tempflow.models.hub import CARDS
from tempflow.types import Size


def test_shrunk_keeps_what_heads_do_not_decide():
    card = json.loads((CARDS / "flux-dev/transformer/config.json").read_text())
    small = shrunk(card, 0.1)
    assert (small["num_layers"], small["num_single_layers"], small["num_attention_heads"]) == (
        2,
        4,
        2,
    )
    assert {key for key in card if card[key] != small[key]} == {
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
    }
    assert shrunk(card, 1e-6)["num_layers"] == 1


def test_shrunk_follows_into_widths_lists_of_blocks_and_nested_configs():
    medium = shrunk(json.loads((CARDS / "sd35-medium/transformer/config.json").read_text()), 0.25)
    assert (
        medium["num_layers"],
        medium["num_attention_heads"],
        medium["caption_projection_dim"],
    ) == (6, 6, 6 * 64)
    assert medium["dual_attention_layers"] == [0, 1, 2, 3], "of the first 13 of 24"
    encoder = shrunk(json.loads((CARDS / "qwen-image/text_encoder/config.json").read_text()), 0.1)
    text, vision = encoder["text_config"], encoder["vision_config"]
    assert (text["num_hidden_layers"], text["vocab_size"], text["hidden_size"]) == (3, 15206, 3584)
    assert vision["depth"] == 3 and vision["fullatt_block_indexes"] == [1, 2]


@pytest.mark.parametrize("card, layers", [("flux2-klein-4b", 27), ("flux2-dev", 30)])
def test_shrunk_keeps_the_layers_that_flux2_reads(card, layers):
    encoder = shrunk(json.loads((CARDS / card / "text_encoder/config.json").read_text()), 0.01)
    assert encoder.get("text_config", encoder)["num_hidden_layers"] == layers


@pytest.mark.parametrize(
    "card",
    [folder for folder in sorted(CARDS.iterdir()) if folder.is_dir()],
    ids=lambda folder: folder.name,
)
def test_the_whole_is_not_shrunk(card):
    for file in card.rglob("config.json"):
        config = json.loads(file.read_text())
        assert shrunk(config, 1.0) == config


@pytest.mark.parametrize(
    "kind", ["CLIPTokenizer", "T5TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast"]
)
def test_tokenizers_are_as_long_as_the_real_ones(tmp_path, kind):
    import transformers

    write_tokenizer(kind, tmp_path, 77)
    tokenizer = getattr(transformers, kind).from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 77 and len(tokenizer) <= VOCABULARY
    assert tokenizer('the word "ABC"').input_ids != tokenizer('the word "XYZ"').input_ids


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="flux-dev"):
        make_pipeline("flux-pro", tmp_path / "out")
    for scale in (0, 1.5):
        with pytest.raises(UserError, match="--scale"):
            make_pipeline("flux-dev", tmp_path / "out", scale=scale)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, text",
    [("sd35-medium", (77 + 256, 4096)), ("qwen-image", (256, 3584)), ("z-image", (32, 2560))],
)
def test_guided_shapes_load_and_predict(tmp_path, shape, text):
    """With prompts as long as the real ones; tests/engine/test_family_runs.py trains these families
    with their configs, in bf16, in which a CPU multiplies six times as long as in fp32."""
    policy = load_policy(
        str(make_pipeline(shape, tmp_path / "model", scale=0.02)),
        dtype="float32",
        max_sequence_length=256,
    )
    conditioning, size = policy.encode(examples(["a word"])), Size(32, 64)
    assert next(iter(conditioning.values())).shape == (1, *text)
    x = torch.randn(1, *policy.latent_shape(size))
    with torch.no_grad():
        v = policy.velocity(policy.transformer, x, torch.full((1,), 0.5), conditioning, size, 4.5)
    assert v.shape == x.shape and v.isfinite().all()


@pytest.mark.slow
def test_the_cards_command_trains_a_shrunk_flux(tmp_path):
    """configs/flux_zero3.json as it stands, but for the path, the size and the amounts, on two
    ranks. The frozen parts are in fp32: a CPU takes some 80 times as long for a convolution in
    bf16, and this is FLUX's whole VAE."""
    folder = make_pipeline("flux-dev", tmp_path / "flux", scale=0.02)
    assert (
        not list(folder.rglob("*.bin"))
        and (folder / "transformer/diffusion_pytorch_model.safetensors").exists()
    )
    settings = {
        "model.path": str(folder),
        "model.dtype": "float32",
        "model.max_sequence_length": 32,
        "data.prompts_per_iteration": 2,
        "rollout.height": 32,
        "rollout.width": 64,
        "rollout.num_steps": 3,
        "rollout.plan.seeds": 1,
        "rollout.plan.children": 2,
        "rollout.plan.branch_steps": [0],
        "rewards": {"jpeg": 1.0},
        "reward_pool.workers": 0,
        "training.iterations": 1,
        "eval.every": 0,
        "logging.dir": str(tmp_path),
        "logging.tensorboard": False,
        "data.embedding_cache": str(tmp_path / "cache"),
    }
    pairs = [
        part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    config = ROOT / "configs/flux_zero3.json"
    done = ranks(2, ROOT / "engine/train.py", "--config", config, *pairs)
    row = Run(tmp_path / "flux_zero3", done).rows[-1]
    assert row["iteration"] == 1 and row["grad_norm"] > 0
