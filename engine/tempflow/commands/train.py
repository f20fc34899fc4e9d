"""Train a config, or say with --dry-run what that takes."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from functools import partial
from typing import Any, Sequence

from tempflow import cli
from tempflow.arguments import path, positive
from tempflow.config import load_config
from tempflow.errors import UserError
from tempflow.training.start import checked_inputs, start


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Align a flow-matching text-to-image model with TempFlow-GRPO."
    )
    parser.add_argument("--config", type=path, required=True, help="JSON config file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a config key",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run directory from its newest checkpoint",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the memory and time a run needs; load and write nothing",
    )
    dry = parser.add_argument_group("with --dry-run")
    dry.add_argument("--gpus", type=positive, default=1, metavar="N", help="GPUs of the run")
    dry.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of the peak speed that the model's operations reach",
    )
    dry.add_argument(
        "--card-gb", type=float, default=80.0, metavar="GB", help="memory of a GPU, in 10^9 bytes"
    )
    dry.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0,
        metavar="TFLOPS",
        help="its peak speed; 989: H100, bf16, dense",
    )
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="CUDA profiler on from iteration START to before STOP",
    )
    # the launcher passes it
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def dry_run(args: argparse.Namespace) -> int:
    """What the run will need, from JSON files alone; a run's own checks come first."""
    finite = all(
        math.isfinite(value) and value > 0 for value in (args.mfu, args.card_gb, args.peak_tflops)
    )
    if not finite or args.mfu > 1:
        raise UserError("--mfu: above 0, at most 1; --card-gb, --peak-tflops: above 0")
    config = load_config(args.config, args.set)
    cli.quiet_libraries()
    from tempflow.estimate import estimate, local_model, propose, show, show_proposal
    from tempflow.models import most_images

    # configs of some hub models are kept here
    asked, config.model.path = (config.model.path, local_model(config.model.path))
    _, train, heldout = checked_inputs(config, dry=True)
    machine: dict[str, Any] = {
        "gpus": args.gpus,
        "mfu": args.mfu,
        "card_gb": args.card_gb,
        "peak_tflops": args.peak_tflops,
    }
    judge = partial(estimate, **machine, prompts=len(train), images=most_images(train + heldout))
    result = judge(config)  # type: ignore[call-arg]  # mypy miscounts a partial with a table of keywords
    if int(os.environ.get("RANK", 0)) == 0:
        show(replace(result, model=asked))
        show_proposal(result, propose(config, judge, args.gpus))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.dry_run:
        with cli.collector_off():
            return dry_run(args)
    start(args.config, resume=args.resume, overrides=args.set, profile=args.profile)
    return 0


command = partial(cli.run, main)
