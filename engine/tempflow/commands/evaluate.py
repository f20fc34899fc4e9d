"""Score a run's model on held-out prompts: a line of JSON on stdout, and images where asked for."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Sequence

from tempflow import cli
from tempflow.run import outputs
from tempflow.run.means import gain_text, with_error
from tempflow.run.metrics import changes, drift_texts
from tempflow.run.streams import check_result


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from tempflow.arguments import add_checkpoint_arguments, path, positive, steps

    parser = argparse.ArgumentParser(
        description="Score a run's model on held-out prompts, with fixed noise."
    )
    add_checkpoint_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--base", action="store_true", help="score the model before training instead"
    )
    which.add_argument(
        "--compare",
        action="store_true",
        help="score the model before training too, and say how far this one is from it",
    )
    parser.add_argument(
        "--prompts", type=path, help="prompt file (default: the run's held-out prompts)"
    )
    parser.add_argument(
        "--count",
        type=positive,
        help="prompts used, from the top of the file (default: as in the run)",
    )
    parser.add_argument(
        "--num-steps", type=steps, help="ODE steps (default: the run's eval.num_steps)"
    )
    parser.add_argument(
        "--out",
        type=path,
        help=(
            "folder for images and samples.json, with --compare its folders base and tuned; must"
            " not exist, or be empty"
        ),
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    cli.quiet_libraries()
    args = parse_args(argv)
    with outputs.new_folder(args.out, args.run) if args.out else nullcontext() as draft:
        score(args, draft)
    check_result()
    return 0


def score(args: argparse.Namespace, draft: Path | None) -> None:
    """Evaluate, print the numbers, and write the images into `draft` if there is one."""
    from rich.console import Console

    from tempflow.run import tuned

    config, chosen = tuned.choose(args.run, args.checkpoint, args.weights, args.base)
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
    Console(highlight=False, stderr=True, soft_wrap=True).print("\n".join(lines), markup=False)
    print(json.dumps(done.result, allow_nan=False), flush=True)
    if draft:
        done.write(draft)


def _reward(r: dict) -> str:
    """One evaluation in a line."""
    which = (
        "base" if r["weights"] == "base" else f"iteration {r['iteration']}, {r['weights']} weights"
    )
    reward = (
        f"reward {with_error(r['reward'], r['stderr'])} on {r['scored']} of {r['prompts']} prompts"
        f" ({r['failed']} failed)"
    )
    return f"{which}: {reward}, {r['num_steps']} steps"


def _change(r: dict) -> str:
    """The gain over the base, and beside it how far the images have moved."""
    gain = (
        "unknown: no prompt was scored in both"
        if r["gain"] is None
        else gain_text(r["gain"], r["gain_stderr"])
    )
    changed = f" ({'; '.join(found)})" if (found := changes(r)) else ""
    return f"gain {gain}; drift: {', '.join(drift_texts(r))}{changed}"


command = partial(cli.run, main)
