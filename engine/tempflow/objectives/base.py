"""The protocol of objectives."""

from __future__ import annotations

from abc import ABC


class Objective(ABC):  # noqa: B024
    """What an update minimizes."""
