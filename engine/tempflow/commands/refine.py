"""Refine images of prompts by a reward, without training: best of n, or rounds of noising the best
and drawing it again."""

from __future__ import annotations

import argparse
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

import numpy as np

from tempflow import cli
from tempflow.errors import UserError, note, shown
from tempflow.run import outputs

if TYPE_CHECKING:
    from tempflow.config import Config, Suffix
    from tempflow.types import Example


def step_range(text: str) -> tuple[int, int]:
    """A step, or two with dots between them: of the first round and of the last."""
    from tempflow.arguments import whole

    first, dots, last = text.partition("..")
    read = whole(0, 998)
    return (read(first), read(last if dots else first))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from tempflow.arguments import (
        add_checkpoint_arguments,
        add_image_argument,
        filled,
        number,
        path,
        positive,
        seed,
        steps,
        whole,
    )

    parser = argparse.ArgumentParser(
        description="Search for images of high reward with a run's model, or one before training."
    )
    add_checkpoint_arguments(parser, required=False)
    parser.add_argument("--base", action="store_true", help="use the run's model before training")
    parser.add_argument(
        "--config", type=path, help="in place of --run: a config, whose model is used as it is"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --config: override a key of it",
    )
    parser.add_argument(
        "--out", type=path, required=True, help="folder for the images; must not exist, or be empty"
    )
    parser.add_argument(
        "--prompt",
        type=filled,
        action="append",
        help="a prompt; may be given again (default: held-out prompts)",
    )
    add_image_argument(parser)
    parser.add_argument("--prompts", type=path, help="prompt file")
    parser.add_argument(
        "--count", type=positive, default=8, help="prompts used, from the top of a file"
    )
    parser.add_argument(
        "--rewards",
        type=filled,
        metavar="JSON",
        help='what is searched by, as {"ocr": 1.0} (default: the config\'s)',
    )
    parser.add_argument(
        "--rounds",
        type=whole(0, 10_000),
        default=8,
        help="0: the best of the first --children images",
    )
    parser.add_argument(
        "--children",
        type=whole(1, 10_000),
        default=6,
        help="images of a prompt in each round, and at first",
    )
    parser.add_argument(
        "--step",
        type=step_range,
        metavar="A..B",
        help=(
            "step to which the best is noised, first to last round (default: 3..1 of 10 steps, of"
            " others in proportion)"
        ),
    )
    parser.add_argument(
        "--explore",
        choices=("noise", "branch"),
        default="noise",
        help="candidates have a noise each, or share one and branch from it",
    )
    parser.add_argument(
        "--target", type=number, help="leave a prompt alone once its reward has reached this"
    )
    parser.add_argument(
        "--suffix",
        type=filled,
        metavar="JSON",
        help="as rollout.suffix: coarser steps after the noise (default: exact)",
    )
    parser.add_argument(
        "--num-steps", type=steps, help="ODE steps (default: the run's eval.num_steps)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the noise")
    args = parser.parse_args(argv)
    if (args.run is None) is (args.config is None):
        parser.error("expected one of --run and --config")
    if args.config and (args.base or args.checkpoint is not None or args.weights):
        parser.error(
            "--base, --checkpoint and --weights choose a run's weights, and --config names no run"
        )
    if args.set and not args.config:
        parser.error("--set needs --config; a run's config is what it was trained with")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    cli.quiet_libraries()
    args = parse_args(argv)
    with outputs.new_folder(args.out, *([args.run] if args.run else [])) as draft:
        written = search(args, draft)
    print(written)
    return 0


def search(args: argparse.Namespace, draft: Path) -> str:
    """Refine, write what was found into `draft`, and return what to say of it."""
    from tempflow.config import load_config
    from tempflow.run import refined, tuned
    from tempflow.run.refining import Search

    if args.run:
        config, chosen = tuned.choose(args.run, args.checkpoint, args.weights, args.base)
    else:
        config, chosen = load_config(args.config, args.set), None
    config, suffix = with_rewards(config, args.rewards), read_suffix(args.suffix)
    prompts = chosen_prompts(args, config)
    steps = chosen_steps(args, config)
    if not find_spec("matplotlib"):
        note("rewards.png is not drawn: matplotlib is not installed")
    options = Search(args.rounds, args.children, steps, args.explore == "branch", args.target)
    facts = {
        "model": config.model.path,
        "iteration": chosen.iteration if chosen else 0,
        "weights": chosen.which if chosen else "base",
        "seed": args.seed,
        "children": args.children,
        "explore": args.explore,
    }
    found = refined.search(
        config, chosen, prompts, options, num_steps=args.num_steps, seed=args.seed, suffix=suffix
    )
    found.write(draft, prompts, facts)
    start, last, drawn = (
        np.nanmean(found.first_rewards),
        np.nanmean(found.rounds[-1].rewards),
        found.rounds[-1].drawn,
    )
    images = (
        f"{drawn.min()} to {drawn.max()} images"
        if drawn.min() < drawn.max()
        else f"{drawn[0]} images"
    )
    which = f"iteration {chosen.iteration}, {chosen.which} weights" if chosen else "base"
    return (
        f"{len(prompts)} prompts in {args.out} ({which}): mean reward {start:.3f} of one image,"
        f" {last:.3f} of the best of {images} each"
    )


def with_rewards(config: Config, given: str | None) -> Config:
    """The config with the rewards of --rewards. UserError as for the section `rewards` of a
    config."""
    from tempflow.rewards import check_frames, parse_rewards

    if given is not None:
        config = config.model_copy(update={"rewards": read_table("--rewards", given)})
    check_frames(parse_rewards(config.rewards), config.rollout.size)
    return config


def read_suffix(given: str | None) -> Suffix | None:
    from pydantic import ValidationError

    from tempflow.config import Suffix

    if given is None:
        return None
    try:
        suffix = Suffix(**read_table("--suffix", given))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"--suffix: {'.'.join(map(str, first['loc']))} {first['msg']}".replace("  ", " ")
        ) from None
    if suffix.weights != "same" or suffix.audit_every:
        raise UserError(
            "--suffix: weights and audit_every belong to training; allowed are stride, order and"
            " exact_steps"
        )
    return suffix


def read_table(option: str, text: str) -> dict:
    """A JSON table of a command line. UserError for anything else."""
    from tempflow.config import strict_json

    try:
        table = strict_json.loads(text)
    except ValueError as error:
        raise UserError(f"{option}: expected JSON, got {shown(text)}: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{option}: expected a JSON table, got {shown(text)}")
    return table


def chosen_prompts(args: argparse.Namespace, config: Config) -> list[Example]:
    from tempflow.commands import sample

    return sample.chosen_prompts(args, config)


def chosen_steps(args: argparse.Namespace, config: Config) -> tuple[int, int]:
    """k of the first round and of the last. UserError for a --step that the grid does not have."""
    num_steps = args.num_steps or config.eval.num_steps or config.rollout.num_steps
    last = num_steps - 2
    steps = args.step or (min(round(0.3 * num_steps), last), min(round(0.1 * num_steps), last))
    if args.rounds and not all(0 <= step <= last for step in steps):
        if last < 0:
            raise UserError(
                f"--rounds: a grid of {num_steps} steps has none that takes noise; allowed is 0, or"
                " a larger --num-steps"
            )
        allowed = f"0 to {last} (of {num_steps} steps, of which the last takes no noise)"
        raise UserError(f"--step: expected steps from {allowed}, got {steps[0]}..{steps[1]}")
    return steps


command = partial(cli.run, main)
