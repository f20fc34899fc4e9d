"""Scores batches of images in worker processes while the trainer continues.

Each worker has a thread that hands it batches from a shared queue and waits for the answers, so
`submit` never blocks. Failures end as masks: if a reward raises an exception, returns malformed
scores or NaN for every image, or if its worker dies or hangs, the batch is tried again after a
pause; when all tries have failed, its values are NaN and are counted. `workers.py` decides when a
worker process is replaced. Batches are neither split nor merged: the caller chooses their size, and
one batch occupies one worker.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from tempflow.errors import UserError
from tempflow.media import check_media, is_video
from tempflow.rewards.base import Scores, as_scores
from tempflow.rewards.fit import applies
from tempflow.rewards.frames import chosen_frames
from tempflow.rewards.registry import RewardSpec, images_only, load_rewards, takes_videos
from tempflow.rewards.workers import WorkerProcess, Workers, rank_gpu

NOT_FINITE = "not scored: the image holds NaN or infinity"


class Ticket:
    """A submitted batch; `RewardPool.gather` exchanges it for scores.

    Args:
        names: the rewards that score the batch.
        metadata: n tables.
        finite: bool [n]; an image that holds NaN or infinity is not sent to any reward.
    """

    def __init__(self, names: list[str], metadata: list[dict], finite: np.ndarray):
        self.names = names
        self.seconds = 0.0
        """Once gathered: seconds that scoring took in the workers, summed over rewards, without
        waiting and failed tries."""
        self.errors: dict[str, str] = {}
        """Once gathered: for each reward that never answered the batch, the last error."""
        self._scores: dict[str, Future] = {name: Future() for name in names}
        self._applies = {
            name: np.array([applies(name, entry) for entry in metadata], dtype=bool)
            for name in names
        }
        self._finite = finite

    def rows(self, name: str) -> np.ndarray:
        """The places of the images that a reward scores: finite ones, to whose prompt it
        applies."""
        return np.flatnonzero(self._applies[name] & self._finite)

    def scores(self, name: str) -> Scores:
        """A reward's scores of the whole batch; NaN for images that it was not asked to score.
        Blocks until they are there."""
        asked, applies, rows = self._scores[name].result(), self._applies[name], self.rows(name)
        if len(rows) == len(applies):
            return asked
        # Spread the scores over the batch again.
        values = np.full(len(applies), np.nan, dtype=np.float32)
        values[rows] = asked.values
        maps = None
        if asked.maps is not None and len(rows):
            maps = np.zeros((len(applies), *asked.maps.shape[1:]), dtype=np.float32)
            maps[rows] = asked.maps
        # Without details of the reward, and without an image to which it applies but which is not
        # finite, there is nothing to say.
        if asked.details is None and (self._finite | ~applies).all():
            return Scores(values, None, applies, maps)
        details = [NOT_FINITE if one else "" for one in applies]
        for row, text in zip(rows, asked.details or [""] * len(rows), strict=True):
            details[row] = text
        return Scores(values, details, applies, maps)


@dataclass(frozen=True)
class _Task:
    """One batch to be scored by one reward."""

    ticket: Ticket
    name: str
    images: np.ndarray
    prompts: list[str]
    metadata: list[dict]


class RewardPool:
    """Worker processes, each of which holds every reward of `specs`. They see this rank's GPU if an
    entry has `device: "cuda"`, and no GPU otherwise.

    The workers load their rewards while the caller continues; see `wait_ready`. Use the pool in a
    `with` statement, or call `close`.

    Args:
        specs: the rewards.
        workers: number of processes. 0 scores in the calling process, inside `submit`, and passes
            exceptions through, which helps to debug a reward.
        threads_per_worker: CPU threads of each. Keep workers x threads, plus the trainer's own
            threads, within the number of cores.
        timeout_s: seconds for one batch and one reward.
        retries: further tries of a failed batch.
        start_timeout_s: seconds for a worker to load its rewards.
        backoff_s: pause before the first retry in seconds; it doubles at each further one.

    Raises:
        UserError: for unknown rewards or options.
    """

    def __init__(
        self,
        specs: list[RewardSpec],
        *,
        workers: int,
        threads_per_worker: int = 1,
        timeout_s: float = 60.0,
        retries: int = 2,
        start_timeout_s: float = 300.0,
        backoff_s: float = 0.5,
    ):
        if workers < 0:
            raise UserError(f"reward workers: expected 0 or more, got {workers}")
        self._specs = list(specs)
        self._frames = {spec.name: spec.frames for spec in self._specs}
        self._take_videos = {spec.name for spec in self._specs if takes_videos(spec)}
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._failures = 0
        self._last_error: str | None = None
        self._local = load_rewards(self._specs, threads_per_worker) if workers == 0 else {}
        # "" hides every GPU, so that no worker takes a CUDA context's memory without need.
        gpu = (
            rank_gpu() if any(spec.options.get("device") == "cuda" for spec in self._specs) else ""
        )
        self._size = workers
        # Last, because its threads call `_serve`, which uses the fields above.
        self.workers = Workers(
            self._specs,
            self._serve,
            gpus=[gpu] * workers,
            threads=threads_per_worker,
            start_timeout_s=start_timeout_s,
        )

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def failures(self) -> int:
        """Number of NaN values so far, one per image and reward, whatever the cause."""
        return self._failures

    @property
    def last_error(self) -> str | None:
        """Text of the last failure in a worker, also if a retry succeeded."""
        return self._last_error

    def wait_ready(self) -> None:
        """Wait until every worker has loaded its rewards. UserError with the reason if one
        cannot."""
        self.workers.wait_ready()

    def submit(
        self,
        images: np.ndarray,
        prompts: list[str],
        metadata: list[dict],
        *,
        finite: np.ndarray | None = None,
        rewards: list[str] | None = None,
    ) -> Ticket:
        """Queue a batch for every reward that applies to it. Returns at once, unless `workers` is
        0.

        Args:
            images: uint8 RGB [n, H, W, 3], or videos [n, F, H, W, 3]. They are copied, so the
                caller may overwrite them.
            prompts: n texts.
            metadata: n tables.
            finite: bool [n], as `Policy.decode` returns it; False marks images that are not sent
                to any reward and count as failed. None: all are finite.
            rewards: names of the rewards to ask; None: all.

        Raises:
            UserError: for videos, if one of the rewards takes only images.
            ValueError: if the arguments' lengths differ.
            RuntimeError: if the pool is closed.
        """
        if self._closed.is_set():
            raise RuntimeError("the reward pool is closed")
        images = np.asarray(images)
        check_media(images)
        finite = np.ones(len(images), dtype=bool) if finite is None else finite
        if not len(images) == len(prompts) == len(metadata) == len(finite):
            raise ValueError(
                f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata and"
                f" {len(finite)} of finite"
            )
        names = [spec.name for spec in self._specs] if rewards is None else rewards
        if is_video(images) and (
            unfit := [name for name in names if name not in self._take_videos]
        ):
            raise UserError(images_only(unfit[0]))
        ticket, whole = Ticket(names, metadata, finite), None
        for name in names:
            rows, frames = ticket.rows(name), self._frames[name]
            if frames is None and len(rows) == len(images):
                # one copy for all rewards that score the whole batch
                chosen = whole = np.array(images, order="C") if whole is None else whole
            else:
                chosen = chosen_frames(images, rows, frames)
            task = _Task(
                ticket, name, chosen, [prompts[i] for i in rows], [metadata[i] for i in rows]
            )
            if len(images) and not len(rows):  # the reward applies to none of the images
                self._finish(task, Scores(np.zeros(0, dtype=np.float32)), 0.0)
            else:
                self._tasks.put(task) if self._size else self._score_here(task)
        return ticket

    def gather(self, tickets: list[Ticket]) -> list[dict[str, Scores]]:
        """Wait for batches.

        This always ends, because every try has a timeout. Batches that are open when the pool is
        closed are NaN.

        Returns:
            For each ticket every reward's scores, by name.

        Raises:
            UserError: if the workers cannot start.
        """
        self.wait_ready()  # a worker that cannot load is an error of the user, not failed scores
        return [{name: ticket.scores(name) for name in ticket.names} for ticket in tickets]

    def close(self) -> None:
        """Kill the workers. A `with` statement calls this at its end; calling it again is safe."""
        self._closed.set()  # first, so that no thread starts another try
        for _ in range(self._size):
            self._tasks.put(None)  # wakes a thread that waits for work, and ends it
        self.workers.close()

    def _serve(self, worker: WorkerProcess) -> None:
        """Score queued batches until None comes."""
        while (task := self._tasks.get()) is not None:
            self._finish(task, *self._score(worker, task))

    def _score(self, worker: WorkerProcess, task: _Task) -> tuple[Scores, float]:
        """A task's scores and the seconds they took; NaN and 0 when all tries have failed."""
        n, error = len(task.images), "the reward pool was closed"
        failed, answered = None, False
        for attempt in range(self._retries + 1):
            # The pause before a retry; closing the pool ends it.
            if self._closed.wait(self._backoff_s * 2 ** (attempt - 1) if attempt else 0):
                break
            try:
                scores, seconds = worker.score(
                    task.name, task.images, task.prompts, task.metadata, self._timeout_s
                )
                if n == 0 or not np.isnan(scores.values).all():
                    return scores, seconds
                # NaN for every image is tried again like an error: a judge or a server that is
                # away answers so. Its details say why, so they are kept for the report.
                failed, answered = scores if scores.details else None, True
                error = (
                    "NaN for every image of the"
                    f" batch{f' ({scores.details[0]})' if scores.details else ''}"
                )
            # Not only WorkerFailure: pickle raises for metadata that cannot be sent. Nothing may
            # end this thread, or `gather` would wait forever.
            except Exception as failure:
                failed, answered, error = None, False, str(failure)
            self._remember_error(f"reward {task.name!r}: {error}")
        if not answered:
            task.ticket.errors[task.name] = error
        return (
            failed
            or Scores(
                np.full(n, np.nan, dtype=np.float32), [f"not scored: {_last_line(error)}"] * n
            ),
            0.0,
        )

    def _score_here(self, task: _Task) -> None:
        start = time.perf_counter()
        result = self._local[task.name].score(task.images, task.prompts, task.metadata)
        self._finish(task, as_scores(result, len(task.images)), time.perf_counter() - start)

    def _finish(self, task: _Task, scores: Scores, seconds: float) -> None:
        with self._lock:
            self._failures += int(np.isnan(scores.values).sum())
            task.ticket.seconds += seconds
        # After the counts: `gather` returns as soon as the last result is there.
        task.ticket._scores[task.name].set_result(scores)

    def _remember_error(self, error: str) -> None:
        with self._lock:
            self._last_error = error


def _last_line(error: str) -> str:
    """Of a traceback, the line with the exception."""
    return error.strip().splitlines()[-1]
