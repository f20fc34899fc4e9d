"""Write a run's model for plain diffusers: a pipeline folder, or LoRA weights.

The files need nothing of this project: `from_pretrained` and `load_lora_weights` read them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Sequence

from tempflow import arguments, cli
from tempflow.run import outputs


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a diffusers pipeline folder, or LoRA weights, from a checkpoint."
    )
    arguments.add_checkpoint_arguments(parser)
    arguments.add_out_argument(parser, "the pipeline or the LoRA weights")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge the adapters of a LoRA run and write a whole pipeline",
    )
    arguments.add_dtype_argument(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    cli.quiet_libraries()
    args = parse_args(argv)
    with outputs.new_folder(args.out, args.run) as draft:
        written = export(args, draft)
    print(written)
    return 0


def export(args: argparse.Namespace, draft: Path) -> str:
    """Write the model into `draft`; returns the line to print."""
    import diffusers

    from tempflow.checkpoints import load
    from tempflow.checkpoints.lora_files import write_lora
    from tempflow.models import check_model
    from tempflow.models.arguments import DTYPES
    from tempflow.models.loading import save_pipeline
    from tempflow.models.opened import load_whole

    chosen = load.load_tuned(args.run, args.checkpoint, args.weights)
    # Adapters can be written without loading the model. A whole pipeline loads all its weights, in
    # the dtype that is written.
    if (lora := chosen.config.model.lora) and not args.merge:
        pipeline = getattr(diffusers, check_model(chosen.config.model.path))
        write_lora(chosen.weights, lora.rank, lora.alpha, pipeline, draft, DTYPES[args.dtype])
        kind = "LoRA weights"
    else:
        save_pipeline(load.apply(chosen, load_whole(chosen.config, args.dtype)), draft)
        kind = "diffusers pipeline"
    return f"{kind} of iteration {chosen.iteration} ({chosen.which} weights): {args.out}"


command = partial(cli.run, main)
