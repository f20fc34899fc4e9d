"""Search for images of high reward without training.

Either the best of n images, or rounds that add noise to the best image so far and sample it again.
"""

from __future__ import annotations

import argparse
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

import numpy as np

from tempflow import arguments, cli
from tempflow.commands.sample import chosen_prompts
from tempflow.errors import UserError, counted, note, shown
from tempflow.run import outputs

if TYPE_CHECKING:
    from tempflow.config import Config, Suffix


def step_range(text: str) -> tuple[int, int]:
    """The type of --step: one step, or FIRST..LAST for the first and the last round."""
    first, dots, last = text.partition("..")
    # A step without dots is for all rounds. A grid has at most 1000 steps, numbered from 0, and the
    # last one takes no noise.
    read = arguments.whole(0, 998)
    return (read(first), read(last if dots else first))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Search for images of high reward with a run's model, or with any base model."
    )
    arguments.add_checkpoint_arguments(parser, required=False)
    parser.add_argument("--base", action="store_true", help="use the run's model before training")
    parser.add_argument(
        "--config",
        type=arguments.path,
        metavar="FILE",
        help="use the untrained model of a config, instead of --run",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of --config; may be repeated",
    )
    arguments.add_out_argument(parser)
    arguments.add_sampling_arguments(parser, count=8)
    parser.add_argument(
        "--rewards",
        type=arguments.filled,
        metavar="JSON",
        help='rewards to search by, such as {"ocr": 1.0} (default: those of the config)',
    )
    parser.add_argument(
        "--rounds",
        type=arguments.whole(0, 10_000),
        default=8,
        metavar="N",
        help="rounds after the first images; 0 keeps the best of these (default: 8)",
    )
    parser.add_argument(
        "--children",
        type=arguments.whole(1, 10_000),
        default=6,
        metavar="N",
        help="images of each prompt, at first and in each round (default: 6)",
    )
    parser.add_argument(
        "--step",
        type=step_range,
        metavar="A[..B]",
        help=(
            "step of the grid to which the best image is noised, in the first and in the last round"
            " (default: 3..1 for 10 steps, in proportion for others)"
        ),
    )
    parser.add_argument(
        "--explore",
        choices=("noise", "branch"),
        default="noise",
        help="children have noise of their own, or branch off one noised image (default: noise)",
    )
    parser.add_argument(
        "--target",
        type=arguments.number,
        metavar="R",
        help="stop refining a prompt once its reward is at least R",
    )
    parser.add_argument(
        "--suffix",
        type=arguments.filled,
        metavar="JSON",
        help="coarser steps after the noise, a table as rollout.suffix (default: exact steps)",
    )
    args = parser.parse_args(argv)
    if (args.run is None) is (args.config is None):
        parser.error("expected either --run or --config")
    if args.config and (args.base or args.checkpoint is not None or args.weights):
        parser.error(
            "--base, --checkpoint and --weights choose weights of a run; they are not allowed with"
            " --config"
        )
    if args.set and not args.config:
        parser.error("--set needs --config; the config of a run cannot be changed afterwards")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    cli.quiet_libraries()
    args = parse_args(argv)
    with outputs.new_folder(args.out, *([args.run] if args.run else [])) as draft:
        written = search(args, draft)
    print(written)
    return 0


def search(args: argparse.Namespace, draft: Path) -> str:
    """Refine, write the images and tables into `draft`, and return the line to print."""
    from tempflow.config import load_config
    from tempflow.run import refined, tuned
    from tempflow.run.refining import Search

    if args.run:
        config, chosen = tuned.choose(args.run, args.checkpoint, args.weights, args.base)
    else:
        config, chosen = load_config(args.config, args.set), None
    # All of these can be refused, so they come before the model is loaded.
    config, suffix = with_rewards(config, args.rewards), read_suffix(args.suffix)
    prompts = chosen_prompts(args, config)
    steps = chosen_steps(args, config)
    # matplotlib is an optional package; the images and tables do without it.
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
    # nanmean: a prompt whose every image failed has no reward. Prompts that reached --target drew
    # fewer images than the others.
    start, last, drawn = (
        np.nanmean(found.first_rewards),
        np.nanmean(found.rounds[-1].rewards),
        found.rounds[-1].drawn,
    )
    images = (
        f"{drawn.min()} to {drawn.max()} images"
        if drawn.min() < drawn.max()
        else counted(drawn[0], "image")
    )
    which = f"iteration {chosen.iteration}, {chosen.which} weights" if chosen else "base"
    return (
        f"{counted(len(prompts), 'prompt')} in {args.out} ({which}): mean reward"
        f" {start:.3f} of one image, {last:.3f} of the best of {images} each"
    )


def with_rewards(config: Config, given: str | None) -> Config:
    """The config, with the rewards of --rewards where given.

    Raises UserError as for the section `rewards` of a config.
    """
    from tempflow.rewards import check_frames, parse_rewards

    # A copy: the config of the run is not changed. Its rewards are replaced, not merged.
    if given is not None:
        config = config.model_copy(update={"rewards": read_table("--rewards", given)})
    check_frames(parse_rewards(config.rewards), config.rollout.size)
    return config


def read_suffix(given: str | None) -> Suffix | None:
    """The table of --suffix. Raises UserError."""
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
            "--suffix: weights and audit_every apply to training only; allowed are stride, order"
            " and exact_steps"
        )
    return suffix


def read_table(option: str, text: str) -> dict:
    """The JSON table that an option gives. Raises UserError for anything else."""
    from tempflow.config import strict_json

    try:
        table = strict_json.loads(text)
    except ValueError as error:
        raise UserError(f"{option}: expected JSON, got {shown(text)}: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{option}: expected a JSON table, got {shown(text)}")
    return table


def chosen_steps(args: argparse.Namespace, config: Config) -> tuple[int, int]:
    """The step that images are noised to, in the first and in the last round.

    Raises UserError for a --step that the grid does not have.
    """
    num_steps = args.num_steps or config.eval.num_steps or config.rollout.num_steps
    last = num_steps - 2  # the last step of the grid ends at sigma 0, where no noise is left
    steps = args.step or (min(round(0.3 * num_steps), last), min(round(0.1 * num_steps), last))
    if args.rounds and not all(0 <= step <= last for step in steps):
        if last < 0:
            raise UserError(
                f"--rounds: got {args.rounds}, but no step of a grid of {num_steps} takes noise;"
                " allowed is 0, or a larger --num-steps"
            )
        allowed = f"0 to {last} (the last of the {num_steps} steps takes no noise)"
        raise UserError(f"--step: expected steps from {allowed}, got {steps[0]}..{steps[1]}")
    return steps


command = partial(cli.run, main)
