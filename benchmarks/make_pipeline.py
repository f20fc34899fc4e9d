"""Writes a diffusers pipeline folder of a real architecture with random weights, to rehearse and to measure with.

    python benchmarks/make_pipeline.py --shape flux-dev --out DIR [--scale 0.1] [--device cuda]

The shapes are those of the model cards in configs/models/; the tokenizers are the shipped model's, of characters. --scale
shrinks depth and heads, for a machine that cannot hold the whole. Weights are bfloat16 in sharded safetensors. Any config
then runs unchanged with `--set model.path=DIR`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from tempflow import cli
from tempflow.errors import UserError
from tempflow.machine import device_name

ROOT = Path(__file__).parent.parent
CARDS, SMALL = ROOT / "configs/models", ROOT / "engine/tempflow/assets/tiny-flux"
DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers")  # at least 1 each


def shrunk(config: dict, scale: float) -> dict:
    """A config with depth and number of heads scaled, and the widths that follow from the heads."""
    config = dict(config)
    for name in DEPTHS:
        if name in config:
            config[name] = max(1, round(config[name] * scale))
    if "num_attention_heads" in config and "attention_head_dim" in config:
        config["num_attention_heads"] = max(1, round(config["num_attention_heads"] * scale))
    return config


def make_pipeline(shape: str, out: Path, *, scale: float = 1.0, device: str = "cpu") -> Path:
    """The folder of pipeline `shape` (a card's name). Raises UserError for an unknown shape or a scale outside (0, 1]."""
    cli.quiet_libraries()
    card = CARDS / shape
    if not (card / "model_index.json").exists():
        raise UserError(f"--shape {shape}: no such card; known are {', '.join(sorted(p.name for p in CARDS.iterdir() if p.is_dir()))}")
    if not 0 < scale <= 1:
        raise UserError(f"--scale {scale}: above 0, at most 1")
    index = json.loads((card / "model_index.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    for part, value in index.items():
        if not isinstance(value, list):
            continue
        library, name = value
        if part.startswith("tokenizer"):
            shutil.copytree(SMALL / part, out / part, dirs_exist_ok=True)
        elif part == "scheduler":
            shutil.copytree(card / part, out / part, dirs_exist_ok=True)
        else:
            config = shrunk(json.loads((card / part / "config.json").read_text()), scale)
            random_model(library, name, config, device).save_pretrained(out / part, max_shard_size="5GB")
    (out / "model_index.json").write_text(json.dumps(index, indent=1))
    return out


@torch.no_grad()
def random_model(library: str, name: str, config: dict, device: str) -> torch.nn.Module:
    """A bfloat16 model with weights as its class initialises them, made on the device; always the same ones."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if library == "diffusers":
                return kind.from_config(config)
            return kind(kind.config_class(**config))
    finally:
        torch.set_default_dtype(default)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    folder = make_pipeline(args.shape, args.out, scale=args.scale, device=args.device)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    print(f"{folder}: {args.shape}, scale {args.scale}, {size / 1e9:.2f} GB, made on {device_name()}")
    return 0


if __name__ == "__main__":
    cli.run(main)
