"""Types and shared options of the command lines.

A value that is not allowed is an error of argparse: it names the option, and the status is 2. The
API reads its arguments with the same types. This module imports no library, so that a wrong option
is refused at once.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Callable

from tempflow.errors import shown
from tempflow.run.places import at_home

LARGEST = 2**31 - 1


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A type for whole numbers from `low` to `high`, both included."""

    def read(text: str) -> int:
        digits = text.removeprefix("-")
        # int() alone would also take "1_000", " 1 " and digits of other scripts, and raises a
        # ValueError of its own past 4300 digits, so the form is checked first.
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
    # float() reads "nan" and "inf" too, which compare in surprising ways later.
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {shown(text)}")
    return value


def bounded(words: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for finite numbers for which `holds` is true; `words` say so in the message."""

    def read(text: str) -> float:
        value = number(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"expected a number {words}, got {shown(text)}")
        return value

    return read


def filled(text: str) -> str:
    """A text that is not empty.

    An empty option usually comes from a shell variable that is not set; the default would hide
    that.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a text that is not empty, got {shown(text)}")
    return text


def path(text: str) -> Path:
    """A file or folder; a leading ~ is the home folder.

    Shells do not expand the ~ of `--out=~/images`. An empty text is refused because Path("") is the
    working folder.
    """
    try:
        return Path(at_home(filled(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def checkpoint(text: str) -> int | str:
    """The number of an iteration, or the word "best"."""
    if text == "best":
        return text
    # At most 18 digits, which fit 64 bits.
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"expected an iteration or best, got {shown(text)}")
    return int(text)


above_zero = bounded("above 0", lambda value: value > 0)
positive = whole(1)
steps = whole(1, 1000)  # of a sampling grid; the range of eval.num_steps
seed = whole(0, 2**63 - 1)  # the range of training.seed


def add_checkpoint_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options that choose a run's weights: --run, --checkpoint and --weights."""
    parser.add_argument("--run", type=path, required=required, help="run directory")
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        metavar="N|best",
        help="an iteration, or the checkpoint that checkpoint.keep_best kept (default: newest)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "merge", "raw"),
        help="which trained weights (default: the average if the run keeps one, else raw)",
    )


def add_out_argument(
    parser: argparse.ArgumentParser, holds: str = "the images", required: bool = True
) -> None:
    """Add --out, a folder for `run.outputs.new_folder`."""
    parser.add_argument(
        "--out",
        type=path,
        required=required,
        metavar="FOLDER",
        help=f"folder for {holds}; must be empty or not exist yet",
    )


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, one of the names in `models.arguments.DTYPES`."""
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the written weights (default: float32)",
    )


def add_steps_argument(parser: argparse.ArgumentParser) -> None:
    """Add --num-steps."""
    parser.add_argument(
        "--num-steps",
        type=steps,
        metavar="N",
        help="ODE steps (default: eval.num_steps of the config)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, count: int) -> None:
    """Add what to sample and how: --prompt, --image, --prompts, --count, --num-steps, --seed.

    Args:
        parser: receives the options.
        count: default of --count.
    """
    parser.add_argument(
        "--prompt",
        type=filled,
        action="append",
        metavar="TEXT",
        help="a prompt; may be repeated (default: held-out prompts)",
    )
    parser.add_argument(
        "--image",
        type=path,
        nargs="+",
        action="append",
        metavar="FILE",
        help=(
            "condition images of a --prompt: given once, for every prompt; else one --image for"
            " each --prompt, in order"
        ),
    )
    parser.add_argument("--prompts", type=path, metavar="FILE", help="prompt file")
    parser.add_argument(
        "--count",
        type=positive,
        default=count,
        metavar="N",
        help=f"use the first N prompts of the file (default: {count})",
    )
    add_steps_argument(parser)
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="seed of the noise (default: 0)"
    )
