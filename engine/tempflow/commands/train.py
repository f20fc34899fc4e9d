"""Train a config, or estimate with --dry-run what that needs."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial
from typing import Sequence

from tempflow import cli
from tempflow.arguments import above_zero, bounded, path, positive
from tempflow.config import Config, load_config
from tempflow.training.start import checked_inputs, start


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a flow-matching image or video model by reinforcement learning."
    )
    parser.add_argument(
        "--config", type=path, required=True, metavar="FILE", help="JSON config file"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of the config; may be repeated",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run directory from its newest checkpoint",
    )
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="run the CUDA profiler from iteration START until before STOP",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the memory, disk and time the run needs; load no weights and write nothing",
    )
    dry = parser.add_argument_group("with --dry-run")
    dry.add_argument("--gpus", type=positive, default=1, metavar="N", help="GPUs (default: 1)")
    dry.add_argument(
        "--card-gb",
        type=above_zero,
        default=80.0,
        metavar="GB",
        help="memory of a GPU in 10^9 bytes (default: 80)",
    )
    dry.add_argument(
        "--peak-tflops",
        type=above_zero,
        default=989.0,
        metavar="TFLOPS",
        help="peak speed of a GPU (default: 989, an H100 in dense bf16)",
    )
    dry.add_argument(
        "--mfu",
        type=bounded("above 0, at most 1", lambda value: 0 < value <= 1),
        default=0.4,
        metavar="SHARE",
        help="share of the peak speed that the model reaches (default: 0.4)",
    )
    # DeepSpeed's launcher adds this option to the command of every rank. The ranks read the
    # environment variables that it sets as well.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # Without the dry run these would be ignored, and a long run would start instead.
    for name in ("gpus", "card_gb", "peak_tflops", "mfu"):
        if not args.dry_run and getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --{name.replace('_', '-')}: needs --dry-run")
    return args


def dry_run(args: argparse.Namespace) -> int:
    """Print what the run needs, from JSON files alone, after all checks that a run makes."""
    config = load_config(args.config, args.set)
    cli.quiet_libraries()
    from tempflow.estimate import Estimate, estimate, local_model, propose, show, show_proposal
    from tempflow.models import most_images

    # The package has the JSON files of some hub models, so that their dry runs need no network.
    # Tables name the model as the user did.
    asked, config.model.path = (config.model.path, local_model(config.model.path))
    _, train, heldout = checked_inputs(config, dry=True)

    def judge(config: Config) -> Estimate:
        return estimate(
            config,
            gpus=args.gpus,
            mfu=args.mfu,
            card_gb=args.card_gb,
            peak_tflops=args.peak_tflops,
            prompts=len(train),
            images=most_images(train + heldout),
        )

    result = judge(config)
    # Under a launcher every rank computes the same; one prints it.
    if int(os.environ.get("RANK", 0)) == 0:
        show(replace(result, model=asked))
        show_proposal(result, propose(config, judge, args.gpus))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.dry_run:
        # The collector slows the imports, which are a large part of a dry run's time.
        with cli.collector_off():
            return dry_run(args)
    start(args.config, resume=args.resume, overrides=args.set, profile=args.profile)
    return 0


command = partial(cli.run, main)
