"""The parent's side of reward worker processes: `WorkerProcess` starts one, exchanges messages with
it, ends it and restarts it; `Workers` has several, which load their rewards at the same time, each
driven by a thread of its own.

A new process loads its models again, which can be gigabytes. A process is therefore replaced only
if it died, hung or sent a malformed message, or if it failed `FAILURES_IN_A_ROW` batches in a row:
after some errors a GPU stays unusable for the process, which does not end by itself.
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
_STDERR_TAIL = 2000  # bytes of a dead worker's output that an error message shows

# Removed from a worker's environment: libraries would take it for a rank of the training and, for
# example, wait for the other ranks.
_REMOVED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WorkerFailure(Exception):
    """The worker raised an exception, died, hung, or sent a malformed message; the text says
    which."""


class WorkerProcess:
    """One worker process, started and replaced as needed. Only `close` is thread-safe.

    Args:
        specs: the rewards that it loads.
        threads: its CPU threads.
        gpu: its CUDA_VISIBLE_DEVICES; "" hides every GPU.
        start_timeout_s: seconds for loading the rewards.
    """

    def __init__(self, specs: list[RewardSpec], threads: int, gpu: str, start_timeout_s: float):
        self._specs, self._threads, self._gpu = specs, threads, gpu
        self._start_timeout_s = start_timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen | None = None
        self._failures = 0  # in a row
        self.broken = False
        """Whether the last attempt to start it failed."""

    @property
    def pid(self) -> int | None:
        """The process id, or None if no process runs."""
        process = self._process  # read once: another thread may replace it meanwhile
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
        # Not only WorkerFailure: OSError if there is no memory for a process, and what pickle
        # raises for options that cannot be sent.
        except Exception as error:
            self.kill()
            self.broken = True
            raise (
                error if isinstance(error, WorkerFailure) else WorkerFailure(repr(error))
            ) from None
        self._failures, self.broken = 0, False

    def score(self, name: str, images, prompts, metadata, timeout_s: float) -> tuple[Scores, float]:
        """Let one reward score one batch; starts the process unless it runs.

        Args:
            name: the reward.
            images: uint8 [n, H, W, 3] or [n, F, H, W, 3].
            prompts: n texts.
            metadata: n tables.
            timeout_s: seconds after which the process is killed.

        Returns:
            The scores, and the seconds that they took in the process.

        Raises:
            WorkerFailure: if there are no scores. Pickle's own exceptions are passed on for
                metadata that cannot be sent.
        """
        self.start()
        try:
            values, details, maps, seconds = self._exchange(
                (name, images, prompts, metadata), timeout_s, "answer", "timeout_s"
            )
        except WorkerFailure:
            self._failures += 1
            if self._failures == FAILURES_IN_A_ROW:
                self.kill()  # the next batch starts a new one
            raise
        self._failures = 0
        return Scores(values, details, maps=maps), seconds

    def kill(self) -> None:
        """End the process at once, if one runs."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()  # leaves no zombie, and frees its GPU memory before the next one starts
            self._connection.close()
            self._output.close()

    def close(self) -> None:
        """Kill the process, from any thread, and let every later `start` raise WorkerFailure."""
        with self._lock:
            self._closed = True
            process = self._process  # read once: its own thread may set it to None meanwhile
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
        # Under the lock, so that `close` never misses a process that is being started. `theirs` is
        # closed here once the child has it; otherwise reading would not end when the child dies.
        with self._lock, theirs:
            if self._closed:
                raise WorkerFailure("the reward workers are closed")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,  # the terminal shows the progress display
                stderr=self._output,
                env=_environment(self._threads, self._gpu),
                pass_fds=[theirs.fileno()],
                # The terminal's Ctrl-C does not reach a new session, even before worker_main has
                # set its signal handlers.
                start_new_session=True,
            )

    def _exchange(self, message: tuple, timeout_s: float, task: str, key: str):
        """Send a message and wait for the answer. A watchdog kills a worker that takes longer than
        `timeout_s`, which closes the pipe and so ends the wait. task, key: what the worker had to
        do, and the config key of the timeout, for the error message."""
        process = self._process
        assert process is not None  # the caller has started it
        expired = threading.Event()
        watchdog = threading.Timer(timeout_s, self._expire, (expired, process))
        watchdog.daemon = True
        watchdog.start()
        try:
            self._connection.send(message)
            reply = self._connection.recv_bytes()
        except (EOFError, OSError):
            status = process.wait()
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
        # Something in the worker wrote into the pipe. More may follow, so the process is replaced.
        except Exception as error:
            self.kill()
            raise WorkerFailure(f"the reward worker sent a malformed message ({error!r})") from None
        if kind == "failed":
            raise WorkerFailure(answer)
        return answer

    @staticmethod
    def _expire(expired: threading.Event, process: subprocess.Popen) -> None:
        expired.set()  # before the kill, whose effect the other thread sees at once
        process.kill()

    def _last_words(self) -> str:
        descriptor = self._output.fileno()
        # pread, because the worker writes at the same file position, which reading would move.
        size = os.fstat(descriptor).st_size
        tail = (
            os.pread(descriptor, _STDERR_TAIL, max(0, size - _STDERR_TAIL))
            .decode(errors="replace")
            .strip()
        )
        return f"; it wrote:\n{tail}" if tail else ""


class Workers:
    """Worker processes that load the same rewards, each driven by a thread.

    Args:
        specs: the rewards that each worker loads.
        serve: called with each worker, in its thread, after it has loaded its rewards or failed to.
            It must return when its owner is closed.
        gpus: for each worker its CUDA_VISIBLE_DEVICES; "": no GPU.
        threads: CPU threads of each worker.
        start_timeout_s: seconds for loading the rewards.
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
        """Whether at least one worker could be started at its last attempt."""
        return not all(worker.broken for worker in self._workers)

    def wait_ready(self) -> None:
        """Wait until every worker has loaded its rewards. UserError with the reason if one
        cannot."""
        for started in self._started:
            try:
                started.result()
            except WorkerFailure as error:
                raise UserError(str(error)) from None

    def close(self) -> None:
        """Kill the workers and wait for their threads. The owner must have made `serve` return, or
        this blocks."""
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
        # Also after a failure: someone must answer the tasks that are queued, and `score` tries to
        # start the worker again.
        self._serve(worker)
        worker.kill()


def rank_gpu() -> str:
    """The GPU of this rank (of rank 0, if nothing was launched), as a CUDA_VISIBLE_DEVICES value;
    "" for none."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(rank)
    # Names of the launcher's list, not numbers: they may be GPU UUIDs, or start above 0.
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return names[rank] if rank < len(names) else ""


def _environment(threads: int, gpu: str) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in _REMOVED}
    for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[key] = str(threads)
    environment["CUDA_VISIBLE_DEVICES"] = gpu
    # A reward given as `my_module:MyReward` must be importable in the worker as it is here. "" in
    # sys.path means the working directory.
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return environment
