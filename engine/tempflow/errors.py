"""Messages for users: errors that they can cause and fix, and notes.

Messages may quote values of any size. `shown` abbreviates a value, and a message that is still
longer than a screen (a library's, or a list of two hundred keys) loses its middle.
"""

from __future__ import annotations

import os
import sys

SCREEN = 2000  # characters: 25 lines of 80
VALUE = 100  # characters of a quoted value


class UserError(Exception):
    """Bad input. The message names the key or file, the value that came and what is allowed.

    Commands print the message alone and exit with status 2. If all ranks raise it, the first rank
    of each machine prints it.
    """

    def __init__(self, message: str = ""):
        super().__init__(shortened(str(message), SCREEN))


class RankError(UserError):
    """A UserError that other ranks may not raise, so it is printed on every rank."""


def shown(value, most: int = VALUE) -> str:
    """Quote a value in a message: its repr, shortened to `most` characters."""
    try:
        return shortened(repr(value), most)
    except ValueError:
        # Python refuses to print integers of more than 4300 digits.
        return f"a {type(value).__name__} of {value.bit_length()} bits"


def shortened(text: str, most: int) -> str:
    """Shorten `text` to `most` characters: its beginning and end, with the length between them."""
    if len(text) <= most:
        return text
    # The beginning names the key, so it gets three quarters of the room.
    cut = f" ... ({len(text)} characters) ... "
    kept = max(0, most - len(cut))
    return text[: kept - kept // 4] + cut + text[len(text) - kept // 4 :]


def counted(number: float, noun: str) -> str:
    """A number and a noun, in the plural unless it is 1."""
    text = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"


def check_range(name: str, value: float, *, least=None, above=None, most=None, below=None) -> None:
    """Raise UserError if a number is outside its range.

    Args:
        name: of the option; the message begins with it.
        value: the number. NaN is in no range.
        least: smallest allowed value.
        above: the value must be greater than this.
        most: largest allowed value.
        below: the value must be less than this.
    """
    said = [
        (least, "at least", lambda v, b: v >= b),
        (above, "above", lambda v, b: v > b),
        (most, "at most", lambda v, b: v <= b),
        (below, "below", lambda v, b: v < b),
    ]
    bounds = [(bound, words, holds) for bound, words, holds in said if bound is not None]
    if not all(holds(value, bound) for bound, _, holds in bounds):
        raise UserError(
            f"{name}: expected a number"
            f" {' and '.join(f'{words} {bound}' for bound, words, _ in bounds)}, got {shown(value)}"
        )


def brief(error: BaseException, most: int = 3 * VALUE) -> str:
    """The first line of a library's error, or its type if it has no text."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0], most) if lines else type(error).__name__


def note(text: str) -> None:
    """Print a note on the first rank, on stderr, because stdout may hold a command's result."""
    # By the launcher's variable: notes are given before the ranks have joined.
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {shortened(text, SCREEN)}", file=sys.stderr, flush=True)
