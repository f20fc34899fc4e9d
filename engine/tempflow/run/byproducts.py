"""What a run can do without: images for people, the report, trackers. An error in one of them never
ends the run."""

from __future__ import annotations

import sys
from typing import Callable, TypeVar

T = TypeVar("T")


class ByProducts:
    """Tries what a run can do without. What fails is named once on stderr; it is tried again
    whenever it is due."""

    def __init__(self):
        self._named: set[str] = set()

    def attempt(self, name: str, action: Callable[..., T], *args) -> T | None:
        """action(*args), or None where it raises any Exception. name: what the warning calls it, a
        file or a config key."""
        try:
            return action(*args)
        except Exception as error:
            if name not in self._named:
                self._named.add(name)
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                print(
                    f"warning: {name} failed ({reason}); the run goes on, later tries are silent",
                    file=sys.stderr,
                    flush=True,
                )
            return None
