"""Reward worker processes seen from their parent: `WorkerProcess` starts one, exchanges messages
with it, ends it and starts it anew; `Workers` holds several that load their rewards side by side,
each driven by a thread of its own.

A new process loads its models anew, gigabytes perhaps. So one that answers is kept, whatever it
answers, until it has failed `FAILURES_IN_A_ROW` batches: the state of a GPU, for one, can be past
repair without the process ending.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from multiprocessing import Pipe
from typing import Callable

from tempflow.errors import UserError
from tempflow.rewards.base import Scores
from tempflow.rewards.registry import RewardSpec

FAILURES_IN_A_ROW = 3
_STDERR_TAIL = 2000  # bytes of a dead worker's last words in an error message

# A worker must not believe itself a rank of the training.
_REMOVED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WorkerFailure(Exception):
    """The worker raised, died, hung, or answered nonsense; the text says which."""


class WorkerProcess:
    """One worker process, started and replaced as needed. Not thread-safe but for `close`.

    gpu: what it sees as CUDA_VISIBLE_DEVICES; "" hides every GPU. start_timeout_s: for loading its
    rewards.
    broken: whether it could not be started when last needed.
    """

    def __init__(self, specs: list[RewardSpec], threads: int, gpu: str, start_timeout_s: float):
        self._specs, self._threads, self._gpu = specs, threads, gpu
        self._start_timeout_s = start_timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen | None = None
        self._failures = 0  # in a row
        self.broken = False

    @property
    def pid(self) -> int | None:
        """Of the running process, or None."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start the process unless it runs, and load the rewards in it. Raises WorkerFailure."""
        if self._process is not None:
            return
        try:
            self._spawn()
            self._exchange(
                (self._specs, self._threads),
                self._start_timeout_s,
                "load its rewards",
                "start_timeout_s",
            )
        except (
            Exception
        ) as error:  # besides WorkerFailure: no memory for a process, options that cannot be sent
            self.kill()
            self.broken = True
            raise (
                error if isinstance(error, WorkerFailure) else WorkerFailure(repr(error))
            ) from None
        self._failures, self.broken = 0, False

    def score(self, name: str, images, prompts, metadata, timeout_s: float) -> tuple[Scores, float]:
        """Scores of one batch by one reward, and the seconds they took; starts the process unless
        it runs.

        Raises WorkerFailure, and what pickle raises for metadata that cannot be sent.
        """
        self.start()
        try:
            values, details, seconds = self._exchange(
                (name, images, prompts, metadata), timeout_s, "answer", "timeout_s"
            )
        except WorkerFailure:
            self._failures += 1
            if self._failures == FAILURES_IN_A_ROW:
                self.kill()
            raise
        self._failures = 0
        return Scores(values, details), seconds

    def kill(self) -> None:
        """End the process at once, if any."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            self._connection.close()
            self._output.close()

    def close(self) -> None:
        """Kill the process from any thread, for good: a later `start` raises WorkerFailure."""
        with self._lock:
            self._closed = True
            process = self._process  # its own thread may forget it meanwhile
            if process is not None:
                process.kill()

    def _spawn(self) -> None:
        self._connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()
        command = [
            sys.executable,
            "-m",
            "tempflow.rewards.worker_main",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        with self._lock, theirs:
            if self._closed:
                raise WorkerFailure("the reward workers are closed")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,  # the terminal belongs to the progress display
                stderr=self._output,
                env=_environment(self._threads, self._gpu),
                pass_fds=[theirs.fileno()],
                # out of reach of the terminal's Ctrl-C, even while Python starts
                start_new_session=True,
            )

    def _exchange(self, message: tuple, timeout_s: float, task: str, key: str):
        """Send, and wait for the answer; a watchdog kills a worker that takes longer, which ends
        the wait."""
        expired = threading.Event()
        watchdog = threading.Timer(timeout_s, self._expire, (expired, self._process))
        watchdog.daemon = True
        watchdog.start()
        try:
            self._connection.send(message)
            reply = self._connection.recv_bytes()
        except (EOFError, OSError):
            status = self._process.wait()  # type: ignore[union-attr]  # called while the process is there
            late = f"the reward worker did not {task} within {timeout_s:g} s ({key}) and was killed"
            cause = (
                late
                if expired.is_set()
                else f"the reward worker died with exit status {status}{self._last_words()}"
            )
            self.kill()
            raise WorkerFailure(cause) from None
        finally:
            watchdog.cancel()
        try:
            kind, answer = pickle.loads(reply)
        except Exception as error:  # whatever wrote into its pipe, it may have more in it
            self.kill()
            raise WorkerFailure(f"the reward worker answered nonsense ({error!r})") from None
        if kind == "failed":
            raise WorkerFailure(answer)
        return answer

    @staticmethod
    def _expire(expired: threading.Event, process: subprocess.Popen) -> None:
        expired.set()
        process.kill()

    def _last_words(self) -> str:
        descriptor = self._output.fileno()
        # pread: the worker writes through the same file position.
        size = os.fstat(descriptor).st_size
        tail = (
            os.pread(descriptor, _STDERR_TAIL, max(0, size - _STDERR_TAIL))
            .decode(errors="replace")
            .strip()
        )
        return f"; it wrote:\n{tail}" if tail else ""


class Workers:
    """One worker per entry of `gpus`, which is what it sees ("": no GPU), with every reward of
    `specs`.

    serve: called with each worker, in its thread, once it has loaded its rewards or failed to; it
    returns when its owner is closed.
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
        self._threads = [
            threading.Thread(target=self._live, args=pair, daemon=True) for pair in pairs
        ]
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
        """Wait until every worker has loaded its rewards; `UserError` with the reason if one
        cannot."""
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


def rank_gpu() -> str:
    """The GPU of this rank (of the first, where nothing was launched), as CUDA_VISIBLE_DEVICES
    would name it; "" for none."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(rank)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return names[rank] if rank < len(names) else ""


def _environment(threads: int, gpu: str) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in _REMOVED}
    for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[key] = str(threads)
    environment["CUDA_VISIBLE_DEVICES"] = gpu
    # Rewards given as `my_module:MyReward` must import in the worker as they do here.
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return environment
