"""Merge the trained weights of several runs into one model for plain diffusers.

The result is their weighted mean. LoRA sources give LoRA weights, of which the rank is the sum of
the sources' ranks; otherwise it is a whole pipeline.
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
        description=(
            "Write the weighted mean of several runs' weights: a diffusers folder, or LoRA weights."
        )
    )
    parser.add_argument(
        "sources",
        nargs="+",
        type=arguments.path,
        metavar="SOURCE",
        help="run directory, one of its checkpoint folders, diffusers folder, or LoRA weights",
    )
    arguments.add_out_argument(parser, "the pipeline or the LoRA weights")
    parser.add_argument(
        "--weights",
        type=arguments.number,
        nargs="+",
        metavar="W",
        help="a number for each source, in order, with sum 1 (default: equal)",
    )
    parser.add_argument(
        "--checkpoint",
        type=arguments.checkpoint,
        metavar="N|best",
        help="which checkpoint of every run directory (default: newest)",
    )
    arguments.add_dtype_argument(parser)
    args = parser.parse_args(argv)
    if len(args.sources) < 2:
        parser.error("SOURCE: expected at least two")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    cli.quiet_libraries()
    args = parse_args(argv)
    print(merge(args))
    return 0


def merge(args: argparse.Namespace) -> str:
    """Write the merged weights; returns the line to print."""
    from tempflow.run import merging

    parts = merging.shares(args.weights, len(args.sources))
    sources = [merging.find_source(path, args.checkpoint) for path in args.sources]
    # Before the folder is made: sources that do not fit together leave nothing behind.
    merging.check_sources(sources)
    with outputs.new_folder(args.out, *(source.run for source in sources if source.run)) as draft:
        kind = (
            _write_adapters(sources, parts, draft, args.dtype)
            if sources[0].lora
            else _write_model(sources, parts, draft, args.dtype)
        )
    merged = ", ".join(
        f"{part:g} x {source.path}" for part, source in zip(parts, sources, strict=True)
    )
    return f"{kind}: {args.out} = {merged}"


def _write_adapters(sources: list, parts: list[float], folder: Path, dtype: str) -> str:
    import diffusers

    from tempflow.checkpoints.lora_files import write_lora
    from tempflow.models import check_model
    from tempflow.models.arguments import DTYPES
    from tempflow.run import merging

    adapters, rank = merging.merge_adapters(sources, parts)
    based = [check_model(source.model) for source in sources if source.model]
    # LoRA files may name no model. Any class will do then, because every family writes the adapters
    # of a transformer in the same way.
    pipeline = getattr(diffusers, based[0] if based else "FluxPipeline")
    # alpha = rank: merge_adapters has put each source's own scale into its matrices.
    write_lora(adapters, rank, rank, pipeline, folder, DTYPES[dtype])
    return f"LoRA weights of rank {rank}"


def _write_model(sources: list, parts: list[float], folder: Path, dtype: str) -> str:
    from tempflow.checkpoints import load
    from tempflow.models.loading import save_pipeline
    from tempflow.run import merging

    weights = merging.merge_models(sources, parts)
    save_pipeline(load.replace_weights(merging.whole_pipeline(sources, dtype), weights), folder)
    return "diffusers pipeline"


command = partial(cli.run, main)
