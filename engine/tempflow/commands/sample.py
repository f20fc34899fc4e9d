"""Sample prompts with the base and the tuned model of a run, side by side.

Both start from the same noise, so that a pair differs by training alone.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

from tempflow import arguments, cli
from tempflow.errors import UserError, counted
from tempflow.run import outputs

if TYPE_CHECKING:
    from tempflow.config import Config
    from tempflow.types import Example


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Sample prompts with the base and the tuned model, from the same noise."
    )
    arguments.add_checkpoint_arguments(parser)
    arguments.add_out_argument(parser)
    arguments.add_sampling_arguments(parser, count=16)
    return parser.parse_args(argv)


def chosen_prompts(args: argparse.Namespace, config: Config) -> list[Example]:
    """The prompts that `arguments.add_sampling_arguments` reads; --prompt takes precedence."""
    from tempflow.data.prompts import typed_prompts
    from tempflow.run import tuned

    if args.prompt:
        return typed_prompts(args.prompt, "--prompt", args.image)
    if args.image:
        raise UserError(
            "--image: belongs to a --prompt, and none is given; a prompt file names its own images"
        )
    return tuned.prompts_of(
        config,
        args.prompts,
        args.count,
        "--prompt or --prompts: required, because data.heldout of this run is null",
    )


def main(argv: Sequence[str] | None = None) -> int:
    cli.quiet_libraries()
    args = parse_args(argv)
    with outputs.new_folder(args.out, args.run) as draft:
        written = draw_pairs(args, draft)
    print(written)
    return 0


def draw_pairs(args: argparse.Namespace, draft: Path) -> str:
    """Write the pairs into `draft`; returns the text to print."""
    from tempflow.checkpoints.load import load_tuned
    from tempflow.media import still
    from tempflow.run import collage, tuned
    from tempflow.run.files import encoded

    chosen = load_tuned(args.run, args.checkpoint, args.weights)
    config = chosen.config
    prompts = chosen_prompts(args, config)
    # The base first, because the trained weights replace its own in the same model.
    drawn, missing = tuned.draw(
        config, {"base": None, "tuned": chosen}, prompts, num_steps=args.num_steps, seed=args.seed
    )
    conditions = [collage.conditions(prompt, drawn[0].shape[-3]) for prompt in prompts]
    names, strips = [], []
    # A row is: condition images, base, tuned. A video plays in its own file; the overview `all` is
    # one image, in which a strip of frames stands for it.
    for n, (before, *pair) in enumerate(zip(conditions, *drawn, strict=True)):
        names.append(encoded(collage.row([*before, *pair])).write(draft, f"{n:04d}"))
        strips.append(collage.row([*before, *map(still, pair)]))
    encoded(collage.column(strips)).write(draft, "all")
    (draft / "prompts.txt").write_text(
        "".join(f"{name}\t{p.text}\n" for name, p in zip(names, prompts, strict=True)),
        encoding="utf-8",
    )
    left = "condition images, base" if any(conditions) else "left base"
    written = (
        f"{counted(len(names), 'pair')} in {args.out}: {left}, right iteration {chosen.iteration}"
        f" ({chosen.which} weights)"
    )
    return written + (f"\nwarning: {tuned.not_finite(missing)}" if missing else "")


command = partial(cli.run, main)
