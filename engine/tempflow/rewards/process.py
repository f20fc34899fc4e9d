"""The parent's handle on one reward worker process: start it, exchange messages with it, kill it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from multiprocessing import Pipe

from tempflow.rewards.protocol import Scores
from tempflow.rewards.registry import RewardSpec

_STDERR_TAIL = 2000  # bytes of a dead worker's last words in an error message

# A worker must not believe itself a rank of the training.
_REMOVED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WorkerFailure(Exception):
    """The worker raised, died, hung, or answered nonsense; the text says which."""


class WorkerLost(WorkerFailure):
    """Its process is gone, or was killed for taking too long."""


class WorkerProcess:
    """One worker process, restarted at will. Not thread-safe but for `close`.

    gpu: what it sees as CUDA_VISIBLE_DEVICES; "" hides every GPU.
    """

    def __init__(self, specs: list[RewardSpec], threads: int, gpu: str = ""):
        self._specs = specs
        self._threads = threads
        self._gpu = gpu
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process, or None."""
        process = self._process
        return None if process is None else process.pid

    def start(self, timeout_s: float) -> None:
        """Start the process unless it runs, and load the rewards in it. Raises WorkerFailure."""
        if self._process is None:
            self._spawn()
            self._exchange((self._specs, self._threads), timeout_s)

    def score(self, name: str, images, prompts, metadata, timeout_s: float) -> tuple[Scores, float]:
        """Scores of one batch by one reward, and the seconds they took. Raises WorkerFailure."""
        values, details, seconds = self._exchange((name, images, prompts, metadata), timeout_s)
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
            if self._process is not None:
                self._process.kill()

    def _spawn(self) -> None:
        self._connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()
        command = [sys.executable, "-m", "tempflow.rewards.worker", str(theirs.fileno()), str(os.getpid())]
        with self._lock, theirs:
            if self._closed:
                raise WorkerFailure("the reward pool is closed")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,  # the terminal belongs to the progress display
                stderr=self._output,
                env=_environment(self._threads, self._gpu),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # out of reach of the terminal's Ctrl-C, even while Python starts
            )

    def _exchange(self, message: tuple, timeout_s: float):
        """Send, and wait for the answer; a watchdog kills a worker that takes longer, which ends the wait."""
        expired = threading.Event()
        watchdog = threading.Timer(timeout_s, self._expire, (expired, self._process))
        watchdog.daemon = True
        watchdog.start()
        try:
            self._connection.send(message)
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerLost(self._cause_of_death(expired, timeout_s)) from None
        finally:
            watchdog.cancel()
        if kind == "failed":
            raise WorkerFailure(answer)
        return answer

    @staticmethod
    def _expire(expired: threading.Event, process: subprocess.Popen) -> None:
        expired.set()
        process.kill()

    def _cause_of_death(self, expired: threading.Event, timeout_s: float) -> str:
        status = self._process.wait()
        if expired.is_set():
            return f"the reward worker did not answer within {timeout_s:g} s and was killed"
        descriptor = self._output.fileno()
        # pread: the worker writes through the same file position.
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, _STDERR_TAIL, max(0, size - _STDERR_TAIL)).decode(errors="replace").strip()
        return f"the reward worker died with exit status {status}" + (f"; it wrote:\n{tail}" if tail else "")


def rank_gpu() -> str:
    """The GPU of this rank (of the first, where nothing was launched), as CUDA_VISIBLE_DEVICES would name it; "" for none."""
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
