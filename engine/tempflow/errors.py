"""What a person who runs the scripts is told: the errors that they can cause and fix, and notes.

Both may quote values of any size, so both are kept short here, in one place: `shown` abbreviates a
value, and a message that is longer than a screen all the same (a library's, or a list of two
hundred keys) loses its middle.
"""

from __future__ import annotations

import os
import sys

SCREEN = 2000  # characters: 25 lines of 80
VALUE = 100  # characters of a quoted value


class UserError(Exception):
    """Bad input: the message names the key or file, the value that came and what is allowed.

    Scripts print the message alone and exit with status 2. Of several ranks that raise the same,
    the first of each machine prints it.
    """

    def __init__(self, message: str = ""):
        super().__init__(shortened(str(message), SCREEN))


class RankError(UserError):
    """One that the other ranks do not raise: printed whatever the rank."""


def shown(value, most: int = VALUE) -> str:
    """A value as a message quotes it: its repr, of which at most `most` characters."""
    try:
        return shortened(repr(value), most)
    except ValueError:  # an integer of more digits than Python writes out
        return f"a {type(value).__name__} of {value.bit_length()} bits"


def shortened(text: str, most: int) -> str:
    """`text` in at most `most` characters: where it has more, its beginning and end with the number
    left out between them."""
    if len(text) <= most:
        return text
    cut = f" ... ({len(text)} characters) ... "
    kept = max(0, most - len(cut))
    return text[: kept - kept // 4] + cut + text[len(text) - kept // 4 :]


def check_range(name: str, value: float, *, least=None, above=None, most=None, below=None) -> None:
    """UserError, which begins with the option's name, for a number outside its range. least, most:
    included; above, below: not."""
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
    """What a library's error says in its first line, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0], most) if lines else type(error).__name__


def note(text: str) -> None:
    """Tell something that is no error, on stderr: stdout may be a script's result. The first rank
    alone speaks."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {shortened(text, SCREEN)}", file=sys.stderr, flush=True)
