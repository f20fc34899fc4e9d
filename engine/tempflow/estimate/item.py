"""One row of the dry run's tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """Bytes of one kind. keys: the config keys that decide them."""

    name: str
    bytes: int
    keys: str = ""
