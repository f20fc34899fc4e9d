"""Draw prompts with a run's base and tuned model, side by side."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

from tempflow import cli
from tempflow.errors import UserError
from tempflow.run import outputs

if TYPE_CHECKING:
    from tempflow.config import Config
    from tempflow.types import Example


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from tempflow.arguments import (
        add_checkpoint_arguments,
        add_image_argument,
        filled,
        path,
        positive,
        seed,
        steps,
    )

    parser = argparse.ArgumentParser(
        description="Draw the same prompts and noise with the base and the tuned model."
    )
    add_checkpoint_arguments(parser)
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
        "--count", type=positive, default=16, help="prompts used, from the top of a file"
    )
    parser.add_argument(
        "--num-steps", type=steps, help="ODE steps (default: the run's eval.num_steps)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the noise")
    return parser.parse_args(argv)


def chosen_prompts(args: argparse.Namespace, config: Config) -> list[Example]:
    from tempflow.data.prompts import typed_prompts
    from tempflow.run import tuned

    if args.prompt:
        return typed_prompts(args.prompt, "--prompt", args.image)
    if args.image:
        raise UserError("--image: belongs to a --prompt; prompts of a file name their own images")
    return tuned.prompts_of(
        config,
        args.prompts,
        args.count,
        "--prompt or --prompts: the run has no held-out prompts; name some",
    )


def main(argv: Sequence[str] | None = None) -> int:
    cli.quiet_libraries()
    args = parse_args(argv)
    with outputs.new_folder(args.out, args.run) as draft:
        written = draw_pairs(args, draft)
    print(written)
    return 0


def draw_pairs(args: argparse.Namespace, draft: Path) -> str:
    """Write the pairs into `draft`; returns what to say of them."""
    from tempflow.media import still
    from tempflow.run import collage, tuned
    from tempflow.run.files import encoded

    config, chosen = tuned.choose(args.run, args.checkpoint, args.weights)
    prompts = chosen_prompts(args, config)
    drawn, missing = tuned.draw(
        config, {"base": None, "tuned": chosen}, prompts, num_steps=args.num_steps, seed=args.seed
    )
    conditions = [collage.conditions(prompt, drawn[0].shape[-3]) for prompt in prompts]
    names, strips = [], []
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
        f"{len(names)} pairs in {args.out}: {left}, right iteration {chosen.iteration}"  # type: ignore[union-attr]  # without --base it is a checkpoint
        f" ({chosen.which} weights)"  # type: ignore[union-attr]  # without --base it is a checkpoint
    )
    return written + (
        f"\nwarning: {missing} images hold NaN or infinity; a checkerboard stands for each"
        if missing
        else ""
    )


command = partial(cli.run, main)
