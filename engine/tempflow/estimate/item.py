"""One row of the tables that a dry run prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """The bytes of one purpose."""

    name: str
    bytes: int
    keys: str = ""
    """The config keys that change the number."""
