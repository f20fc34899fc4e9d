"""The signals that stop a training process: at a safe point, or at once where no Python code runs."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager


@contextmanager
def ended_by_signals():
    """SIGINT, SIGTERM and SIGHUP end this process at once: around a wait in C++, where Python's handlers never run."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to that one
        yield
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for kind, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(kind, signal.SIG_DFL)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


class StopSignal:
    """Remembers SIGINT, SIGTERM and SIGHUP (the terminal was closed), so that the run can stop at a safe point; an impatient second
    SIGINT ends it at once."""

    PATIENCE_S = 3.0  # a launcher passes the same Ctrl-C on a second time

    def __init__(self):
        self.received: str | None = None
        self._when = 0.0

    def install(self) -> StopSignal:
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, self._handle)
        return self

    def __call__(self) -> bool:
        return self.received is not None

    def _handle(self, number, frame) -> None:
        if self.received and time.monotonic() - self._when > self.PATIENCE_S and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._when = signal.Signals(number).name, time.monotonic()
