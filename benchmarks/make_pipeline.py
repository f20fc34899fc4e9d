"""Writes a diffusers pipeline folder of a real architecture with random weights, for rehearsals and
measurements.

    python benchmarks/make_pipeline.py --shape flux-dev --out DIR [--scale 0.1] [--device cuda]

The shapes are those of the model cards in engine/tempflow/assets/cards/. The tokenizers are small,
with one token per character, but have the real ones' lengths. --scale shrinks depth, heads and
vocabularies, for a machine that cannot hold the whole model. Weights are bfloat16 in sharded
safetensors. Any config then runs unchanged with `--set model.path=DIR`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder goes to the end of the path: its kernels.py would be imported in place of
    # Hugging Face's package `kernels`.
    sys.path.append(sys.path.pop(0))

import torch
from chat_tokenizers import KLEIN_CHAT, klein_tokenizer, save_dev_processor

from tempflow import cli
from tempflow.errors import UserError
from tempflow.models.hub import CARDS
from tempflow.models.processors import without_videos
from tempflow.run.environment import device_name

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "engine/tempflow/assets/tiny-flux"
# at least 1 each
DEPTHS = (
    "num_layers",
    "num_single_layers",
    "num_hidden_layers",
    "depth",
    "n_layers",
    "n_refiner_layers",
)
# FLUX.2 reads the output of these layers, so at least as many must exist
READ = {"Qwen3ForCausalLM": 27, "Mistral3ForConditionalGeneration": 30}
# lists of blocks by number
BLOCKS = {"dual_attention_layers": "num_layers", "fullatt_block_indexes": "depth"}
VOCABULARY = 2048  # at least this many: the small tokenizers have as many tokens
WORDS = (
    "system user assistant Describe the image by detailing the color shape size texture quantity"
    " text spatial relationships"
)
WORDS += (
    " of the objects and background"  # words of the template into which Qwen-Image puts its prompts
)
EDIT_WORDS = (
    "key features input ( ), , then explain how user's instruction should alter or modify Generate"
    " a new that meets requirements while"
)
EDIT_WORDS += (
    " maintaining consistency with original where appropriate"  # and of Qwen-Image-Edit's template
)
VISION = [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")]


def shrunk(config: dict, scale: float) -> dict:
    """A config with depth, number of heads and vocabulary scaled, and the widths that follow from
    the heads."""
    small = {
        name: shrunk(value, scale) if isinstance(value, dict) else value
        for name, value in config.items()
    }
    for name in DEPTHS:
        if name in config:
            small[name] = max(1, round(config[name] * scale))
    if config.get("architectures", [None])[0] in READ:
        text = small.get("text_config", small)
        text["num_hidden_layers"] = max(READ[config["architectures"][0]], text["num_hidden_layers"])
    for name, depth in BLOCKS.items():
        if name in config:
            small[name] = sorted(
                {round(block * scale) for block in config[name]} & set(range(small[depth]))
            )
    if "num_attention_heads" in config and "attention_head_dim" in config:
        small["num_attention_heads"] = max(1, round(config["num_attention_heads"] * scale))
        if "caption_projection_dim" in config:
            small["caption_projection_dim"] = (
                small["num_attention_heads"] * config["attention_head_dim"]
            )
    if "n_heads" in config:
        heads = max(1, round(config["n_heads"] * scale))
        small |= {
            "n_heads": heads,
            "n_kv_heads": heads,
            "dim": config["dim"] // config["n_heads"] * heads,
        }
    if "vocab_size" in config:
        small["vocab_size"] = max(
            min(VOCABULARY, config["vocab_size"]), round(config["vocab_size"] * scale)
        )
    return small


def qwen_tokenizer():
    """A byte-level tokenizer without merges, with the words of the pipeline's template as tokens:
    34 tokens come before the prompt, as with the real one."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    names = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
    ]
    tokenizer = Qwen2Tokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": names[1:3]})
    tokenizer.add_tokens([word if n < 4 else f" {word}" for n, word in enumerate(WORDS.split())])
    return tokenizer


def qwen_processor():
    """Qwen-Image-Edit's processor: the tokenizer with the marks of images and the words of its
    template, and the real image processor."""
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor
    from transformers.utils import is_torchvision_available

    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *VISION]}
    )
    tokenizer.add_tokens([f" {word}" for word in EDIT_WORDS.split()])
    kind = Qwen2VLProcessor if is_torchvision_available() else without_videos(Qwen2VLProcessor)
    return kind(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}),
        tokenizer,
    )


def qwen3_processor():
    """Qwen-Image 2.1's processor: the same tokenizer with the words of its own template, and a chat
    template that only marks messages."""
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLProcessor
    from transformers.utils import is_torchvision_available

    tokenizer = qwen_processor().tokenizer
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content[0].text +"
        " '<|im_end|>\n' }}{% endfor %}"
    )
    kind = Qwen3VLProcessor if is_torchvision_available() else without_videos(Qwen3VLProcessor)
    return kind(Qwen2VLImageProcessorPil(patch_size=16), tokenizer, chat_template=template)


def write_tokenizer(kind: str, folder: Path, length: int) -> None:
    """Write a small tokenizer that is loaded as one of class `kind`, with at most `length`
    tokens."""
    if kind == "Qwen2Tokenizer":
        tokenizer = qwen_tokenizer()
        tokenizer.chat_template = KLEIN_CHAT  # into which Z-Image puts its prompts too
        tokenizer.save_pretrained(folder)
    elif kind == "Qwen2TokenizerFast":
        klein_tokenizer().save_pretrained(folder)
    elif kind == "PixtralProcessor":
        save_dev_processor(folder)
    elif kind == "Qwen2VLProcessor":
        qwen_processor().save_pretrained(folder)
    elif kind == "Qwen3VLProcessor":
        qwen3_processor().save_pretrained(folder)
    else:
        shutil.copytree(
            SMALL / ("tokenizer" if kind == "CLIPTokenizer" else "tokenizer_2"),
            folder,
            dirs_exist_ok=True,
        )
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "model_max_length": length}, indent=1)
    )


def make_pipeline(shape: str, out: Path, *, scale: float = 1.0, device: str = "cpu") -> Path:
    """Write the folder of the pipeline `shape` (a card's name). UserError for an unknown shape or a
    scale outside (0, 1]."""
    cli.quiet_libraries()
    card = CARDS / shape
    if not (card / "model_index.json").exists():
        raise UserError(
            f"--shape {shape}: no such card; known are"
            f" {', '.join(sorted(p.name for p in CARDS.iterdir() if p.is_dir()))}"
        )
    if not 0 < scale <= 1:
        raise UserError(f"--scale {scale}: above 0, at most 1")
    index = json.loads((card / "model_index.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    for part, value in index.items():
        if not isinstance(value, list):
            continue
        library, name = value
        if part.startswith(("tokenizer", "processor")):
            write_tokenizer(
                name,
                out / part,
                json.loads((card / part / "tokenizer_config.json").read_text())["model_max_length"],
            )
        elif part == "scheduler":
            shutil.copytree(card / part, out / part, dirs_exist_ok=True)
        else:
            config = shrunk(json.loads((card / part / "config.json").read_text()), scale)
            random_model(library, name, config, device).save_pretrained(
                out / part, max_shard_size="5GB"
            )
    (out / "model_index.json").write_text(json.dumps(index, indent=1))
    return out


@torch.no_grad()
def random_model(
    library: str, name: str, config: dict, device: str, dtype: torch.dtype = torch.bfloat16
) -> torch.nn.Module:
    """A model with the random weights that its class initializes, made on the device; the same
    weights every time."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if library == "diffusers":
                return kind.from_config(config)
            return kind(kind.config_class.from_dict(config))
    finally:
        torch.set_default_dtype(default)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    folder = make_pipeline(args.shape, args.out, scale=args.scale, device=args.device)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    print(
        f"{folder}: {args.shape}, scale {args.scale}, {size / 1e9:.2f} GB, made on {device_name()}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
