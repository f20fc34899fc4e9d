"""Pipelines of real shapes with random weights: they load as any checkpoint does, and FLUX's own config trains one."""

import json

import pytest
from engine_cases import ROOT
from make_pipeline import make_pipeline, shrunk
from run_cases import Run, script_here

from tempflow.errors import UserError


def test_shrunk_keeps_what_heads_do_not_decide():
    card = json.loads((ROOT / "configs/models/flux-dev/transformer/config.json").read_text())
    small = shrunk(card, 0.1)
    assert (small["num_layers"], small["num_single_layers"], small["num_attention_heads"]) == (2, 4, 2)
    assert {key for key in card if card[key] != small[key]} == {"num_layers", "num_single_layers", "num_attention_heads"}
    assert shrunk(card, 1.0) == card and shrunk(card, 1e-6)["num_layers"] == 1


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="flux-dev"):
        make_pipeline("flux-pro", tmp_path / "out")
    for scale in (0, 1.5):
        with pytest.raises(UserError, match="--scale"):
            make_pipeline("flux-dev", tmp_path / "out", scale=scale)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_cards_command_trains_a_shrunk_flux(tmp_path):
    """configs/flux_lora.json as it stands, but for the path, the size and the amounts."""
    folder = make_pipeline("flux-dev", tmp_path / "flux", scale=0.05)
    assert not list(folder.rglob("*.bin")) and (folder / "transformer/diffusion_pytorch_model.safetensors").exists()
    settings = {
        "model.path": str(folder), "model.max_sequence_length": 32, "data.prompts_per_iteration": 1, "rollout.height": 32,
        "rollout.width": 64, "rollout.num_steps": 3, "rollout.seeds": 1, "rollout.children": 2, "rollout.branch_steps": [0],
        "rewards": {"jpeg": 1.0}, "reward_pool.workers": 0, "training.iterations": 1, "eval.every": 0,
        "logging.dir": str(tmp_path), "logging.tensorboard": False,
    }  # fmt: skip
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    row = Run(tmp_path / "flux_lora", script_here("train", "--config", ROOT / "configs/flux_lora.json", *pairs)).rows[-1]
    assert row["iteration"] == 1 and row["ratio/first_max_dev"] == 0 and row["grad_norm"] > 0
