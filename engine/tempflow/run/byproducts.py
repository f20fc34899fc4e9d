"""What a run can do without: images for people, the report, trackers.

An error in one of them never ends the run, because hours of training would be lost for a plot.
Checkpoints are not among them: a checkpoint that cannot be written does end the run.
"""

from __future__ import annotations

import sys
from typing import Callable, TypeVar

T = TypeVar("T")


class ByProducts:
    """Tries what a run can do without. A failure is reported on stderr once for each name; the
    action is still tried whenever it is due, since a full disk may have room again."""

    def __init__(self):
        self._named: set[str] = set()

    def attempt(self, name: str, action: Callable[..., T], *args) -> T | None:
        """Call action(*args).

        Args:
            name: what the warning calls it, a file or a config key.
            action: the call to try.
            *args: its arguments.

        Returns:
            Its result, or None where it raised an Exception.
        """
        try:
            return action(*args)
        # Not BaseException: Ctrl-C and SystemExit end the run as anywhere else.
        except Exception as error:
            if name not in self._named:
                # Once: a full disk would otherwise fill the log with a line for each iteration.
                self._named.add(name)
                # In one line and cut: errors of wandb hold whole HTTP responses.
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                print(
                    f"warning: {name} failed ({reason}); the run goes on, later tries are silent",
                    file=sys.stderr,
                    flush=True,
                )
            return None
