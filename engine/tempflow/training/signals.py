"""The signals that stop a training process: at a safe point of the run, or at once during a wait in
C++, where no Python code runs."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _in_main_thread() -> bool:
    """Whether this is the main thread, the only one that Python lets change signal handlers."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handlers_kept():
    """Restore the handlers of SIGINT, SIGTERM and SIGHUP when the block ends. Yields the handlers
    by signal; none outside the main thread."""
    before = {kind: signal.getsignal(kind) for kind in STOPPING} if _in_main_thread() else {}
    try:
        yield before
    finally:
        for kind, handler in before.items():
            if handler is not None:  # None: it was not installed from Python, nor can be
                signal.signal(kind, handler)


@contextmanager
def ended_by_signals():
    """Let SIGINT, SIGTERM and SIGHUP end this process at once.

    For waits in C++: Python runs its handlers only between its own instructions.
    """
    with handlers_kept() as before:
        for kind, handler in before.items():
            # An ignored signal stays ignored: nohup ignores SIGHUP for a reason.
            if handler is not signal.SIG_IGN:
                signal.signal(kind, signal.SIG_DFL)
        yield


class StopSignal:
    """Records SIGINT, SIGTERM and SIGHUP (the terminal was closed), so that the run can stop at a
    safe point. A second SIGINT ends the process at once."""

    # A second SIGINT within this time is not a second Ctrl-C: launchers pass the first one on.
    PATIENCE_S = 3.0

    def __init__(self):
        self.received: str | None = None  # the name of the first signal
        self._when = 0.0

    def install(self) -> StopSignal:
        """Install the handlers; returns the object. Outside the main thread it does nothing, and no
        signal is ever received."""
        if not _in_main_thread():
            return self
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._handle)
        # Under nohup it is ignored, and must stay so.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)
        return self

    def __call__(self) -> bool:
        """Whether a signal was received."""
        return self.received is not None

    def _handle(self, number, frame) -> None:
        # Monotonic, because the wall clock may jump.
        if (
            self.received
            and time.monotonic() - self._when > self.PATIENCE_S
            and number == signal.SIGINT
        ):
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._when = signal.Signals(number).name, time.monotonic()
