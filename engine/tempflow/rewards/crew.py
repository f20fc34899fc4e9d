"""Worker processes that load their rewards side by side, each driven by a thread of its own."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Callable

from tempflow.errors import UserError
from tempflow.rewards.process import WorkerFailure, WorkerProcess
from tempflow.rewards.registry import RewardSpec


class Crew:
    """One worker per entry of `gpus`, which is what it sees ("": no GPU), with every reward of `specs`.

    serve: called with each worker, in its thread, once it has loaded its rewards or failed to; it returns when its owner is closed.
    """

    def __init__(
        self,
        specs: list[RewardSpec],
        serve: Callable[[WorkerProcess], None],
        *,
        gpus: list[str],
        threads: int,
        start_timeout_s: float,
    ):
        self._serve = serve
        self._workers = [WorkerProcess(specs, threads, gpu, start_timeout_s) for gpu in gpus]
        self._started: list[Future] = [Future() for _ in gpus]
        pairs = zip(self._workers, self._started)
        self._threads = [threading.Thread(target=self._live, args=pair, daemon=True) for pair in pairs]
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    @property
    def healthy(self) -> bool:
        """Whether a worker is left that could be started when last needed."""
        return not all(worker.broken for worker in self._workers)

    def wait_ready(self) -> None:
        """Wait until every worker has loaded its rewards; `UserError` with the reason if one cannot."""
        for started in self._started:
            try:
                started.result()
            except WorkerFailure as error:
                raise UserError(str(error)) from None

    def close(self) -> None:
        """Kill the workers and wait for their threads, whose `serve` must be about to return."""
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join()

    def _live(self, worker: WorkerProcess, started: Future) -> None:
        try:
            worker.start()
            started.set_result(None)
        except WorkerFailure as error:
            started.set_exception(error)
        self._serve(worker)
        worker.kill()
