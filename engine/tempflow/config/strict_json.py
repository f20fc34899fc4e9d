"""A JSON reader that refuses two things which Python's accepts silently.

One is a key that is given twice, of which Python keeps the last value. The other is half of a
surrogate pair (an emoji cut in two), which can be neither written to a file nor tokenized, and
would fail later in the run.
"""

from __future__ import annotations

import json
import re

_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class Refused(ValueError):
    """Valid JSON that is refused here; the message names the place."""


class _Repeated(Exception):
    pass


class _Pairs(list):
    """A table as written: (key, value) in order, with keys that are given twice."""


def loads(text: str):
    """Parse JSON.

    Raises:
        Refused: as above; the message names the key as `section.key`.
        ValueError: for text that is not JSON; the message names line and column.
        RecursionError: if it is nested too deeply.
    """
    # Prompt files have 10^5 lines, so the common case takes Python's fast parser. The second pass,
    # several times slower, finds the place of an error. A whole pair of escapes goes that way too,
    # and is accepted there.
    if not _ESCAPED_HALF.search(text):
        try:
            text.encode()
            return json.loads(text, object_pairs_hook=_table)
        except (UnicodeEncodeError, _Repeated):
            pass
    return _built(json.loads(text, object_pairs_hook=_Pairs), "")


def check_text(text: str, name: str = "") -> str:
    """Return `text`, or raise Refused if it contains half of a surrogate pair.

    JSON escapes make such halves, and so do command-line arguments that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"{name} holds" if name else "it holds"
        half = f"half a character (U+{ord(text[error.start]):04X}), as if an emoji was cut in two"
        raise Refused(f"{where} {half}; remove it or write the whole character") from None
    return text


def _table(pairs: list) -> dict:
    table = dict(pairs)
    # The hook does not know where in the text it is, so it cannot name the key's place itself.
    if len(table) < len(pairs):
        raise _Repeated
    return table


def _built(value, name: str):
    """A value read with `_Pairs`, as plain dicts and lists. name: its place, for messages."""
    if isinstance(value, str):
        return check_text(value, name)
    if isinstance(value, list) and not isinstance(value, _Pairs):
        return [_built(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    if not isinstance(value, _Pairs):
        return value
    table = {}
    for key, inner in value:
        label = (
            check_text(key, "a key")
            if key and key.isprintable()
            else repr(check_text(key, "a key"))
        )
        inside = f"{name}.{label}" if name else label
        if key in table:
            raise Refused(f"the key {inside!r} is given twice")
        table[key] = _built(inner, inside)
    return table
