"""The model cards of FLUX.2 against what is published of the checkpoints, and the shipped config on
its card."""

import pytest
import torch
from engine_cases import ROOT

from tempflow.config import load_config
from tempflow.estimate import estimate
from tempflow.models.hub import CARDS, KNOWN, local_model
from tempflow.models.loading import check_checkpoint, check_size, family_of
from tempflow.types import Size

# Bytes of published .safetensors files: bfloat16, and float32 for the VAE. Their headers are the
# rest.
FILES = {"transformer": 7_751_105_712, "text_encoder": 8_044_982_048, "vae": 336_213_556}


def counted(card: str) -> dict[str, int]:
    """Numbers in each module of a card's policy."""
    parts = family_of(str(CARDS / card)).skeleton(str(CARDS / card), torch.bfloat16).pipe.components
    return {
        name: sum(t.numel() for t in part.state_dict().values() if t.is_floating_point())
        for name, part in parts.items()
        if isinstance(part, torch.nn.Module)
    }


def test_klein_4b_has_the_size_of_its_files():
    found = counted("flux2-klein-4b")
    assert found["transformer"] == 3_875_544_576 and counted("flux2-klein-base-4b") == found
    found["text_encoder"] -= 151936 * 2560  # the head is the embedding, which a file holds once
    for name, size in FILES.items():
        header = size - found[name] * (4 if name == "vae" else 2)
        assert 0 < header < 60_000, name


def test_the_larger_ones_are_as_large_as_their_authors_say():
    large, dev = counted("flux2-klein-9b"), counted("flux2-dev")
    assert counted("flux2-klein-base-9b") == large
    assert (large["transformer"], dev["transformer"]) == (
        9_078_581_248,
        32_223_281_152,
    ), "9 B and 32 B"
    assert (large["text_encoder"], dev["text_encoder"]) == (
        8_190_735_360,
        24_011_361_280,
    ), "8.19 B and 24.0 B"
    assert large["vae"] == dev["vae"]


@pytest.mark.parametrize("card", [card for card in KNOWN.values() if card.startswith("flux2")])
def test_a_card_describes_a_family(card):
    folder = str(CARDS / card)
    check_checkpoint(folder, description=True)
    check_size(folder, Size(1024, 1360))
    kind = (
        "Flux2Policy"
        if "dev" in card
        else "Flux2KleinBasePolicy"
        if "base" in card
        else "Flux2KleinPolicy"
    )
    policy = family_of(folder).skeleton(folder)
    assert type(policy).__name__ == kind and policy.latent_shape(Size(512, 768)) == (128, 32, 48)
    width = policy.pipe.text_encoder.config.get_text_config().hidden_size
    assert policy.empty_embeddings(1)["encoder_hidden_states"].shape == (1, 512, 3 * width)


def test_the_shipped_config_fits_its_card():
    """All of it on 48 GB, and with the text encoder beside it."""
    file = ROOT / "configs/flux2_klein_lora.json"
    assert local_model(load_config(file).model.path).endswith("flux2-klein-base-4b")
    assert estimate(load_config(file), card_gb=48).fits
    assert estimate(load_config(file, ["data.embedding_cache=null"]), card_gb=48).fits
