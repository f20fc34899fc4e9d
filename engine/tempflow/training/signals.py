"""The signals that stop a training process: at a safe point, or at once where no Python code
runs."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _in_main_thread() -> bool:
    """Signals belong to that one; no other may change their handlers."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handlers_kept():
    """Put the handlers of SIGINT, SIGTERM and SIGHUP back when the block ends; yields them, none
    outside the main thread."""
    before = {kind: signal.getsignal(kind) for kind in STOPPING} if _in_main_thread() else {}
    try:
        yield before
    finally:
        for kind, handler in before.items():
            if handler is not None:  # None: installed by other than Python code
                signal.signal(kind, handler)


@contextmanager
def ended_by_signals():
    """SIGINT, SIGTERM and SIGHUP end this process at once: around a wait in C++, where Python's
    handlers never run."""
    with handlers_kept() as before:
        for kind, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(kind, signal.SIG_DFL)
        yield


class StopSignal:
    """Remembers SIGINT, SIGTERM and SIGHUP (the terminal was closed), so that the run can stop at a
    safe point; an impatient second SIGINT ends it at once."""

    PATIENCE_S = 3.0  # a launcher passes the same Ctrl-C on a second time

    def __init__(self):
        self.received: str | None = None
        self._when = 0.0

    def install(self) -> StopSignal:
        """Take the signals over; outside the main thread they stay as they are, and nothing is ever
        received."""
        if not _in_main_thread():
            return self
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, self._handle)
        return self

    def __call__(self) -> bool:
        return self.received is not None

    def _handle(self, number, frame) -> None:
        if (
            self.received
            and time.monotonic() - self._when > self.PATIENCE_S
            and number == signal.SIGINT
        ):
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._when = signal.Signals(number).name, time.monotonic()
