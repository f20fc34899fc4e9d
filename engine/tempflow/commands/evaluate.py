"""Score a run's model on held-out prompts.

The result is one line of JSON on stdout; a line for people goes to stderr. With --out the images
are kept.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Sequence

from tempflow import arguments, cli
from tempflow.errors import counted
from tempflow.run import outputs
from tempflow.run.means import gain_text, with_error
from tempflow.run.metrics import changes, drift_texts
from tempflow.run.streams import check_result


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score a run's model on held-out prompts, from fixed noise."
    )
    arguments.add_checkpoint_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true", help="score the model before training")
    which.add_argument(
        "--compare",
        action="store_true",
        help="also score the model before training, and report gain and drift from it",
    )
    parser.add_argument(
        "--prompts",
        type=arguments.path,
        metavar="FILE",
        help="prompt file (default: the run's held-out prompts)",
    )
    parser.add_argument(
        "--count",
        type=arguments.positive,
        metavar="N",
        help="use the first N prompts of the file (default: eval.prompts of the config)",
    )
    arguments.add_steps_argument(parser)
    arguments.add_out_argument(
        parser, "images and samples.json (of --compare: base/ and tuned/)", required=False
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    cli.quiet_libraries()
    args = parse_args(argv)
    with outputs.new_folder(args.out, args.run) if args.out else nullcontext() as draft:
        score(args, draft)
    # Raises if stdout could not take the line: the caller of a script must not read status 0.
    check_result()
    return 0


def score(args: argparse.Namespace, draft: Path | None) -> None:
    """Evaluate, print the numbers, and write the images into `draft` unless it is None."""
    from rich.console import Console

    from tempflow.run import tuned

    config, chosen = tuned.choose(args.run, args.checkpoint, args.weights, args.base)
    # By default the run's own number, so that the result can be compared with its log.
    prompts = tuned.prompts_of(config, args.prompts, args.count or config.eval.prompts)
    done = tuned.score(
        config,
        chosen,
        prompts,
        num_steps=args.num_steps,
        keep=draft is not None,
        compare=args.compare,
    )
    lines = (
        [_reward(done.base.result), _reward(done.result), _change(done.result)]
        if done.base
        else [_reward(done.result)]
    )
    # stderr, because stdout holds the JSON alone and can be piped into a program.
    Console(highlight=False, stderr=True, soft_wrap=True).print("\n".join(lines), markup=False)
    # NaN is not JSON: a mean without a single score is None.
    print(json.dumps(done.result, allow_nan=False), flush=True)
    # After the numbers: an error in writing images does not lose them.
    if draft:
        done.write(draft)


def _reward(r: dict) -> str:
    """One line about an evaluation."""
    which = (
        "base" if r["weights"] == "base" else f"iteration {r['iteration']}, {r['weights']} weights"
    )
    reward = (
        f"reward {with_error(r['reward'], r['stderr'])} on {r['scored']} of"
        f" {counted(r['prompts'], 'prompt')}"
        f" ({r['failed']} failed)"
    )
    return f"{which}: {reward}, {counted(r['num_steps'], 'step')}"


def _change(r: dict) -> str:
    """One line about the gain over the base and the drift of the images."""
    gain = (
        "unknown: no prompt was scored in both"
        if r["gain"] is None
        else gain_text(r["gain"], r["gain_stderr"])
    )
    changed = f" ({'; '.join(found)})" if (found := changes(r)) else ""
    return f"gain {gain}; drift: {', '.join(drift_texts(r))}{changed}"


command = partial(cli.run, main)
