"""What a training process owns besides the model: its CPU threads, its device, and the signals that stop it."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager

import torch

from tempflow.config import Config
from tempflow.run.environment import uses_gpu


def device() -> torch.device:
    """This rank's GPU, made the current one, or the CPU where there is none."""
    if not uses_gpu():
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(chosen)
    return chosen


def cores_per_rank() -> int:
    """CPU cores that this rank may call its own."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


class Threads:
    """CPU threads of this rank: fewer while reward workers run beside it, so that all fit the cores.

    More threads than cores is many times slower than one: OpenMP threads wait for each other in busy loops.
    """

    def __init__(self, config: Config):
        share, pool = cores_per_rank(), config.reward_pool
        self.alone = share
        self.beside_workers = max(1, share - pool.workers * pool.threads_per_worker)
        torch.set_num_threads(self.alone)

    @contextmanager
    def shared(self):
        """While reward workers are busy."""
        torch.set_num_threads(self.beside_workers)
        try:
            yield
        finally:
            torch.set_num_threads(self.alone)


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
