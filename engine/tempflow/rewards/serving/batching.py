"""One reward's worker processes, fed with batches made across requests.

A request's pictures are queued in pieces of at most one batch. A free worker takes the oldest piece and waits a few
milliseconds for others of the same picture size to fill its batch. Where a batch of several pieces fails, each is
scored again alone, so that one request cannot spoil another. A worker whose process is gone, or that failed
`FAILURES_IN_A_ROW` times, is started anew; failing once is not reason enough, for loading a model may take minutes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from tempflow.errors import UserError
from tempflow.rewards.process import WorkerFailure, WorkerLost, WorkerProcess
from tempflow.rewards.protocol import Scores
from tempflow.rewards.registry import RewardSpec

FAILURES_IN_A_ROW = 3


class ScoringFailed(Exception):
    """A piece could not be scored; the text, one line, says why."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Pictures of one request, uint8 RGB [n, H, W, 3], that stay together. `scores` is cancelled by who no longer waits."""

    images: np.ndarray
    prompts: list[str]
    metadata: list[dict]
    scores: Future = field(default_factory=Future)
    arrival: float = field(default_factory=time.monotonic)


class Batcher:
    """Scores pieces with `len(gpus)` worker processes, each of which sees one entry of `gpus` ("": no GPU).

    batch: most pictures scored at once. wait_s: how long a batch that is not full waits for more. timeout_s: for scoring
    one batch; start_timeout_s: for loading the reward. Raises `UserError` for an unknown reward or option.
    """

    def __init__(self, spec: RewardSpec, *, gpus: list[str], threads: int, batch: int, wait_s: float, timeout_s: float,
                 start_timeout_s: float = 1800.0):  # fmt: skip
        self._spec, self._batch, self._wait_s = spec, batch, wait_s
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._queue: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._counts = Counter(pictures=0, batches=0, failed_batches=0)
        self._broken: set[WorkerProcess] = set()
        self._workers = [WorkerProcess([spec], threads, gpu) for gpu in gpus]
        self._started = [Future() for _ in self._workers]
        self._threads = [threading.Thread(target=self._serve, args=pair, daemon=True) for pair in zip(self._workers, self._started)]
        for thread in self._threads:
            thread.start()

    @property
    def healthy(self) -> bool:
        """Whether a worker is left that could be started when last needed."""
        return len(self._broken) < len(self._workers)

    def counts(self) -> dict[str, int]:
        """Pictures and batches scored, batches that failed, pieces waiting."""
        with self._changed:
            return {**self._counts, "waiting": len(self._queue)}

    def wait_ready(self) -> None:
        """Wait until every worker has loaded the reward; `UserError` with the reason if one cannot."""
        for started in self._started:
            try:
                started.result()
            except WorkerFailure as error:
                raise UserError(str(error)) from None

    def submit(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[Future]:
        """Queue the pictures of a request; a future of `Scores` per piece, in order, or of ScoringFailed."""
        pieces = [
            Piece(images[i : i + self._batch], prompts[i : i + self._batch], metadata[i : i + self._batch])
            for i in range(0, len(images), self._batch)
        ]
        with self._changed:
            self._queue.extend(pieces)
            self._changed.notify_all()
        return [piece.scores for piece in pieces]

    def close(self) -> None:
        """Kill the workers and fail what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join()
        for piece in self._queue:
            _settle(piece, ScoringFailed("the server was stopped"))

    def _serve(self, worker: WorkerProcess, started: Future) -> None:
        """The life of one worker's thread: load the reward, then score until closed."""
        try:
            worker.start(self._start_timeout_s)
            started.set_result(None)
        except Exception as error:
            started.set_exception(error if isinstance(error, WorkerFailure) else WorkerFailure(repr(error)))
            worker.kill()
        in_a_row = 0
        while pieces := self._take():
            in_a_row = 0 if self._score(worker, pieces) else in_a_row + 1
            if in_a_row == FAILURES_IN_A_ROW:
                worker.kill()
                in_a_row = 0
        worker.kill()

    def _take(self) -> list[Piece]:
        """The next batch, which waits for the oldest piece; [] once closed."""
        with self._changed:
            while not self._closed:
                while self._queue and self._queue[0].scores.cancelled():
                    self._queue.popleft()
                if not self._queue:
                    self._changed.wait()
                    continue
                chosen = self._fitting()
                left = self._queue[0].arrival + self._wait_s - time.monotonic()
                if left <= 0 or sum(len(piece.images) for piece in chosen) == self._batch:
                    for piece in chosen:
                        self._queue.remove(piece)
                    return chosen
                self._changed.wait(left)
        return []

    def _fitting(self) -> list[Piece]:
        """The oldest piece and, in their order, those of its picture size that a batch has room for."""
        chosen, room = [], self._batch
        for piece in self._queue:
            same_size = piece.images.shape[1:] == self._queue[0].images.shape[1:]
            if same_size and len(piece.images) <= room and not piece.scores.cancelled():
                chosen.append(piece)
                room -= len(piece.images)
        return chosen

    def _score(self, worker: WorkerProcess, pieces: list[Piece]) -> bool:
        """Settle the pieces; whether they, or one of them, could be scored."""
        try:
            scores = self._ask(worker, pieces)
        except Exception as error:  # whatever it was, this thread must live on
            with self._changed:
                self._counts["failed_batches"] += 1
            if len(pieces) > 1:
                wanted = [piece for piece in pieces if not piece.scores.cancelled()]
                return any([self._score(worker, [piece]) for piece in wanted])
            print(f"reward {self._spec.name!r}: {error}", file=sys.stderr, flush=True)
            _settle(pieces[0], ScoringFailed(f"reward {self._spec.name!r}: {str(error).strip().splitlines()[-1]}"))
            return False
        start = 0
        for piece in pieces:
            stop = start + len(piece.images)
            _settle(piece, Scores(scores.values[start:stop], scores.details and scores.details[start:stop]))
            start = stop
        return True

    def _ask(self, worker: WorkerProcess, pieces: list[Piece]) -> Scores:
        """Scores of all pieces in one batch. Raises WorkerFailure; a lost worker is started again at the next call."""
        try:
            worker.start(self._start_timeout_s)
        except Exception as error:
            self._broken.add(worker)
            worker.kill()
            raise WorkerFailure(f"its worker cannot start: {error}") from None
        self._broken.discard(worker)
        images = np.concatenate([piece.images for piece in pieces])
        prompts = [prompt for piece in pieces for prompt in piece.prompts]
        metadata = [entry for piece in pieces for entry in piece.metadata]
        try:
            scores, _ = worker.score(self._spec.name, images, prompts, metadata, self._timeout_s)
        except WorkerLost:
            worker.kill()
            raise
        with self._changed:
            self._counts.update(pictures=len(images), batches=1)
        return scores


def _settle(piece: Piece, result: Scores | ScoringFailed) -> None:
    try:
        piece.scores.set_exception(result) if isinstance(result, Exception) else piece.scores.set_result(result)
    except InvalidStateError:  # cancelled meanwhile
        pass
