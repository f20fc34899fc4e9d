"""Types of command-line options: what cannot be meant is argparse's error, which names the option,
with status 2."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Callable

from tempflow.errors import shown
from tempflow.run.places import at_home

LARGEST = 2**31 - 1


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def read(text: str) -> int:
        digits = text.removeprefix("-")
        if not (
            digits.isascii()
            and digits.isdecimal()
            and len(digits) < 30
            and low <= int(text) <= high
        ):
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {low} to {high}, got {shown(text)}"
            )
        return int(text)

    return read


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {shown(text)}")
    return value


def filled(text: str) -> str:
    """A name or text. An empty one is most often a shell variable that was not set, and no wish for
    the default."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a text that is not empty, got {shown(text)}")
    return text


def path(text: str) -> Path:
    """A file or folder; an empty name would be the working folder. Shells leave the ~ of
    --out=~/images as it is."""
    try:
        return Path(at_home(filled(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def checkpoint(text: str) -> int | str:
    """An iteration, or the word best."""
    if text == "best":
        return text
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"expected an iteration or best, got {shown(text)}")
    return int(text)


def add_checkpoint_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that choose a checkpoint: --run, --checkpoint, --weights."""
    parser.add_argument("--run", type=path, required=required, help="run directory")
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        metavar="N|best",
        help=(
            "an iteration, or the best as checkpoint.keep_best says (default: the newest whole one)"
        ),
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "merge", "raw"),
        help="default: the average where the run keeps one, else raw",
    )


def add_image_argument(parser: argparse.ArgumentParser) -> None:
    """The option --image beside --prompt: a list of paths for each time that it is given."""
    parser.add_argument(
        "--image",
        type=path,
        nargs="+",
        action="append",
        help=(
            "condition images of --prompt; given once they are for every prompt, else once for each"
            " in their order"
        ),
    )


positive = whole(1)
steps = whole(1, 1000)  # of a sampling grid, as rollout.num_steps
seed = whole(0, 2**63 - 1)  # as training.seed
