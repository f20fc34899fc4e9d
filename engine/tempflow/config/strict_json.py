"""JSON without what Python's reader takes in silence: a table that names a key twice, of which it
keeps the last value, and halves of surrogate pairs, which no file and no tokenizer takes."""

from __future__ import annotations

import json
import re

_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class Refused(ValueError):
    """JSON by its grammar, but not taken here; the message names the place."""


class _Repeated(Exception):
    pass


class _Pairs(list):
    """A table as it is written: (key, value) in order."""


def loads(text: str):
    """Parse JSON. Raises Refused as above, naming keys as `section.key`, ValueError for what is no
    JSON, naming line and column, and RecursionError where it is nested too deeply."""
    if not _ESCAPED_HALF.search(text):
        try:
            text.encode()
            return json.loads(text, object_pairs_hook=_table)
        except (
            UnicodeEncodeError,
            _Repeated,
        ):  # the way below, several times slower, finds the place
            pass
    return _built(json.loads(text, object_pairs_hook=_Pairs), "")


def check_text(text: str, name: str = "") -> str:
    """`text` itself. Raises Refused where it holds half a surrogate pair, which escapes and
    undecodable arguments make."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"{name} holds" if name else "it holds"
        half = (
            f"half a character (U+{ord(text[error.start]):04X}), as where an emoji was cut in two"
        )
        raise Refused(f"{where} {half}; remove it or write the whole one") from None
    return text


def _table(pairs: list) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise _Repeated
    return table


def _built(value, name: str):
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
