"""Scores batches of images in worker processes while the trainer goes on.

One thread a worker hands it batches from a shared queue and waits for it, so submitting never
blocks. What goes wrong ends as a mask: where the reward raises, answers nonsense or NaN for every
image, or its worker dies or hangs, the batch is tried again after a pause, and when all tries are
spent its values are NaN and counted. When a worker is replaced is `workers.py`'s affair. Batches
are neither split nor merged: their size is the caller's choice, and one batch occupies one worker.
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
    """A submitted batch. `seconds`, once gathered: what scoring it took in the workers, all rewards
    together, waiting and failed tries apart. `errors`, once gathered: why a reward answered nothing
    at all, by name."""

    def __init__(self, names: list[str], metadata: list[dict], finite: np.ndarray):
        self.seconds, self.names = 0.0, names
        self.errors: dict[str, str] = {}
        self._scores: dict[str, Future] = {name: Future() for name in names}
        self._applies = {
            name: np.array([applies(name, entry) for entry in metadata], dtype=bool)
            for name in names
        }
        self._finite = finite

    def rows(self, name: str) -> np.ndarray:
        """The images that a reward is asked about: finite ones whose prompt is for it."""
        return np.flatnonzero(self._applies[name] & self._finite)

    def scores(self, name: str) -> Scores:
        """What a reward found, of the whole batch: NaN where it was not asked."""
        asked, applies, rows = self._scores[name].result(), self._applies[name], self.rows(name)
        if len(rows) == len(applies):
            return asked
        values = np.full(len(applies), np.nan, dtype=np.float32)
        values[rows] = asked.values
        if asked.details is None and (self._finite | ~applies).all():
            return Scores(values, None, applies)
        details = [NOT_FINITE if one else "" for one in applies]
        for row, text in zip(rows, asked.details or [""] * len(rows), strict=True):
            details[row] = text
        return Scores(values, details, applies)


@dataclass(frozen=True)
class _Task:
    """One batch to be scored by one reward."""

    ticket: Ticket
    name: str
    images: np.ndarray
    prompts: list[str]
    metadata: list[dict]


class RewardPool:
    """Worker processes that each hold every reward of `specs`, and see this rank's GPU if one has
    `device: "cuda"`.

    workers: number of processes; 0 scores in the calling process, inside `submit`, and lets
        exceptions through: for debugging a reward.
    threads_per_worker: what each may use; keep workers x threads, plus the trainer's own, within
    the cores.
    timeout_s: for one batch and one reward. start_timeout_s: for loading the rewards.
    retries: further tries of a failed batch, `backoff_s`, then twice as long, ... apart.

    Raises `UserError` for unknown rewards or options. Workers load while the caller goes on; see
    `wait_ready`.
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
        gpu = (
            rank_gpu() if any(spec.options.get("device") == "cuda" for spec in self._specs) else ""
        )
        self._size = workers
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
        """Values masked so far: NaN for one image by one reward, whatever the cause."""
        return self._failures

    @property
    def last_error(self) -> str | None:
        """Text of the last thing that went wrong in a worker, retried with success or not."""
        return self._last_error

    def wait_ready(self) -> None:
        """Wait until every worker has loaded its rewards; `UserError` with the reason if one
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
        """Queue a batch for every reward that applies to it; returns at once (unless workers=0).

        images: uint8 RGB [n, H, W, 3], or videos [n, F, H, W, 3]; what is sent of them is copied
        here. prompts and metadata: n entries each. finite: bool [n], as `Policy.decode` returns it;
        no reward is asked about the others, which are failures. rewards: names of those asked;
        None: all. Raises UserError for videos where one of them takes images only, ValueError where
        the arguments disagree, RuntimeError on a closed pool.
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
                chosen = whole = np.array(images, order="C") if whole is None else whole
            else:
                chosen = chosen_frames(images, rows, frames)
            task = _Task(
                ticket, name, chosen, [prompts[i] for i in rows], [metadata[i] for i in rows]
            )
            if len(images) and not len(rows):
                self._finish(task, Scores(np.zeros(0, dtype=np.float32)), 0.0)
            else:
                self._tasks.put(task) if self._size else self._score_here(task)
        return ticket

    def gather(self, tickets: list[Ticket]) -> list[dict[str, Scores]]:
        """Wait for batches: for each ticket, every reward's scores.

        Every try has its time-out, so this ends. Raises `UserError` if the workers cannot start.
        Batches still open when the pool is closed are NaN.
        """
        self.wait_ready()
        return [{name: ticket.scores(name) for name in ticket.names} for ticket in tickets]

    def close(self) -> None:
        """Kill the workers. Also done by leaving a `with` block; safe to call again."""
        self._closed.set()
        for _ in range(self._size):
            self._tasks.put(None)
        self.workers.close()

    def _serve(self, worker: WorkerProcess) -> None:
        """Score what is queued until told to stop."""
        while (task := self._tasks.get()) is not None:
            self._finish(task, *self._score(worker, task))

    def _score(self, worker: WorkerProcess, task: _Task) -> tuple[Scores, float]:
        """Scores of a task and the seconds they took; NaN when all tries have failed."""
        n, error = len(task.images), "the reward pool was closed"
        failed, answered = None, False
        for attempt in range(self._retries + 1):
            if self._closed.wait(self._backoff_s * 2 ** (attempt - 1) if attempt else 0):
                break
            try:
                scores, seconds = worker.score(
                    task.name, task.images, task.prompts, task.metadata, self._timeout_s
                )
                if n == 0 or not np.isnan(scores.values).all():
                    return scores, seconds
                failed, answered = scores if scores.details else None, True
                error = (
                    "NaN for every image of the"
                    f" batch{f' ({scores.details[0]})' if scores.details else ''}"
                )
            except Exception as failure:  # besides WorkerFailure: metadata that cannot be sent
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
        task.ticket._scores[task.name].set_result(scores)

    def _remember_error(self, error: str) -> None:
        with self._lock:
            self._last_error = error


def _last_line(error: str) -> str:
    return error.strip().splitlines()[-1]
