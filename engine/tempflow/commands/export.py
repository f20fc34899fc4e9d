"""Write a run's model for plain diffusers: a pipeline folder, or LoRA weights."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Sequence

from tempflow import cli
from tempflow.run import outputs


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from tempflow.arguments import add_checkpoint_arguments, path

    parser = argparse.ArgumentParser(
        description="Write a diffusers pipeline folder, or LoRA weights, from a checkpoint."
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--out", type=path, required=True, help="folder to write; must not exist, or be empty"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="of a LoRA run: a whole pipeline with the adapters merged",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights written",
    )
    return parser.parse_args(argv)


def write_lora(weights, rank: int, alpha: float, pipeline_class, folder: Path, dtype) -> None:
    """pytorch_lora_weights.safetensors, as `pipe.load_lora_weights(folder)` reads it, or of a
    denoiser of two transformers one in a folder for each, the second for `load_lora_weights(folder
    / "transformer_2", load_into_transformer_2=True)`.

    weights: by a checkpoint's names or a file's.
    """
    from peft import LoraConfig

    from tempflow.checkpoints import load
    from tempflow.models.lora import by_expert, layers_of

    state = {
        name.replace(".default.weight", ".weight"): load.cast(name, value, dtype)
        for name, value in weights.items()
    }
    for part, layers in by_expert(state).items():
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers_of(layers)).to_dict()
        pipeline_class.save_lora_weights(
            folder / part,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=settings,
        )


def main(argv: Sequence[str] | None = None) -> int:
    cli.quiet_libraries()
    args = parse_args(argv)
    with outputs.new_folder(args.out, args.run) as draft:
        written = export(args, draft)
    print(written)
    return 0


def export(args: argparse.Namespace, draft: Path) -> str:
    """Write the model into `draft`; returns what to say of it."""
    import diffusers

    from tempflow.checkpoints import load
    from tempflow.models import check_model
    from tempflow.models.arguments import DTYPES
    from tempflow.models.loading import save_pipeline
    from tempflow.models.opened import load_whole

    chosen = load.load_tuned(args.run, args.checkpoint, args.weights)
    if (lora := chosen.config.model.lora) and not args.merge:
        pipeline = getattr(diffusers, check_model(chosen.config.model.path))
        write_lora(chosen.weights, lora.rank, lora.alpha, pipeline, draft, DTYPES[args.dtype])
        kind = "LoRA weights"
    else:
        save_pipeline(load.apply(chosen, load_whole(chosen.config, args.dtype)), draft)
        kind = "diffusers pipeline"
    return f"{kind} of iteration {chosen.iteration} ({chosen.which} weights): {args.out}"


command = partial(cli.run, main)
