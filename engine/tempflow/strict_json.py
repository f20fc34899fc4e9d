"""JSON in which no table names a key twice. Python's reader keeps the last value and drops the others without a word."""

from __future__ import annotations

import json


class RepeatedKey(ValueError):
    """A table that gives a key twice."""


class _Pairs(list):
    """A table as it is written: (key, value) in order."""


def loads(text: str):
    """Parse JSON. Raises ValueError for what is no JSON, RepeatedKey naming one as `section.key`, RecursionError where it is
    nested too deeply."""
    return _built(json.loads(text, object_pairs_hook=_Pairs), "")


def _built(value, name: str):
    if isinstance(value, _Pairs):
        table = {}
        for key, inner in value:
            inside = f"{name}.{key}" if name else key
            if key in table:
                raise RepeatedKey(f"the key {inside!r} is given twice")
            table[key] = _built(inner, inside)
        return table
    return [_built(inner, f"{name}[{i}]") for i, inner in enumerate(value)] if isinstance(value, list) else value
