"""The worker processes of one served reward, and the batches that they score, which combine several
requests.

A request's images are queued in pieces of at most one batch. A free worker takes the oldest piece
and waits a few milliseconds for other pieces of the same image size, to fill its batch. If a batch
of several pieces fails, each piece is scored again by itself, so that one request cannot make
another one fail. `workers.py` decides when a worker process is replaced.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from tempflow.rewards.base import Scores
from tempflow.rewards.registry import RewardSpec, takes_videos
from tempflow.rewards.workers import WorkerProcess, Workers


class ScoringFailed(Exception):
    """A piece could not be scored; the text, one line, says why."""


@dataclass(frozen=True, eq=False)  # eq=False: `deque.remove` compares objects, not arrays
class Piece:
    """Images or videos of one request that are scored in one batch."""

    images: np.ndarray
    """uint8 RGB [n, H, W, 3], or videos [n, F, H, W, 3]."""
    prompts: list[str]
    """n texts."""
    metadata: list[dict]
    """n tables."""
    scores: Future = field(default_factory=Future)
    """Set to `Scores` or ScoringFailed; cancelled when the request no longer waits for it."""
    arrival: float = field(default_factory=time.monotonic)
    """When it was queued, in seconds of the monotonic clock."""


class Batcher:
    """Scores the images of many requests with one reward, in `len(gpus)` worker processes.

    Args:
        spec: the reward.
        gpus: for each worker its CUDA_VISIBLE_DEVICES; "": no GPU.
        threads: CPU threads of each worker.
        batch: most images, or videos, that are scored at once.
        wait_s: seconds that a batch waits to be filled, counted from its oldest piece's arrival.
        timeout_s: seconds for scoring one batch.
        start_timeout_s: seconds for loading the reward.

    Raises:
        UserError: for an unknown reward or option.
    """

    def __init__(
        self,
        spec: RewardSpec,
        *,
        gpus: list[str],
        threads: int,
        batch: int,
        wait_s: float,
        timeout_s: float,
        start_timeout_s: float = 1800.0,
    ):
        self._spec, self._batch, self._wait_s = spec, batch, wait_s
        self.name, self.takes_videos = spec.name, takes_videos(spec)
        self._timeout_s = timeout_s
        # `_changed` guards the three fields below.
        self._queue: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # "pictures" is a key of the server's /rewards page, which others read.
        self._counts = Counter(pictures=0, batches=0, failed_batches=0)
        self._workers = Workers(
            [spec], self._serve, gpus=gpus, threads=threads, start_timeout_s=start_timeout_s
        )

    @property
    def healthy(self) -> bool:
        """Whether at least one worker could be started at its last attempt."""
        return self._workers.healthy

    def counts(self) -> dict[str, int]:
        """Numbers of images and batches scored, of batches that failed, and of pieces waiting."""
        with self._changed:
            return {**self._counts, "waiting": len(self._queue)}

    def wait_ready(self) -> None:
        """Wait until every worker has loaded the reward. UserError with the reason if one
        cannot."""
        self._workers.wait_ready()

    def submit(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[Future]:
        """Queue the images of a request.

        Args:
            images: uint8 RGB [n, H, W, 3], or videos [n, F, H, W, 3].
            prompts: n texts.
            metadata: n tables.

        Returns:
            For each piece, in order, a future of `Scores`; its exception is ScoringFailed.
        """
        pieces = [
            Piece(
                images[i : i + self._batch],
                prompts[i : i + self._batch],
                metadata[i : i + self._batch],
            )
            for i in range(0, len(images), self._batch)
        ]
        with self._changed:
            self._queue.extend(pieces)
            self._changed.notify_all()
        return [piece.scores for piece in pieces]

    def close(self) -> None:
        """Kill the workers, and fail the pieces that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._workers.close()
        for piece in self._queue:
            _settle(piece, ScoringFailed("the server was stopped"))

    def _serve(self, worker: WorkerProcess) -> None:
        """Score queued pieces until the batcher is closed."""
        while pieces := self._take():
            self._score(worker, pieces)

    def _take(self) -> list[Piece]:
        """Wait for the next batch, with the oldest piece in it; [] once closed."""
        with self._changed:
            while not self._closed:
                # A request that timed out or was disconnected has cancelled its pieces.
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
                # A new piece may fill the batch; another worker may take the oldest piece.
                self._changed.wait(left)
        return []

    def _fitting(self) -> list[Piece]:
        """The oldest piece, and the later ones of the same image size that fit into its batch. A
        piece that does not fit is passed over; it becomes the oldest in its turn."""
        chosen, room = [], self._batch
        for piece in self._queue:
            same_size = piece.images.shape[1:] == self._queue[0].images.shape[1:]
            # One array holds a batch, so its images have one size. Later, smaller pieces may fill
            # the room that a larger one does not fit into.
            if same_size and len(piece.images) <= room and not piece.scores.cancelled():
                chosen.append(piece)
                room -= len(piece.images)
        return chosen

    def _score(self, worker: WorkerProcess, pieces: list[Piece]) -> None:
        """Score a batch, and set the result of each piece."""
        try:
            scores = self._ask(worker, pieces)
        except Exception as error:  # of any type: nothing may end this thread
            with self._changed:
                self._counts["failed_batches"] += 1
            if len(pieces) > 1:  # find the piece at fault; the others are scored
                for piece in pieces:
                    if not piece.scores.cancelled():
                        self._score(worker, [piece])
                return
            reason = str(error).strip() or repr(error)
            print(f"reward {self._spec.name!r}: {reason}", file=sys.stderr, flush=True)
            _settle(
                pieces[0], ScoringFailed(f"reward {self._spec.name!r}: {reason.splitlines()[-1]}")
            )
            return
        start = 0
        for piece in pieces:
            stop = start + len(piece.images)
            _settle(
                piece,
                Scores(scores.values[start:stop], scores.details and scores.details[start:stop]),
            )
            start = stop

    def _ask(self, worker: WorkerProcess, pieces: list[Piece]) -> Scores:
        """The scores of all pieces, as one batch. Raises like `WorkerProcess.score`."""
        images = (
            pieces[0].images
            if len(pieces) == 1
            else np.concatenate([piece.images for piece in pieces])
        )
        prompts = [prompt for piece in pieces for prompt in piece.prompts]
        metadata = [entry for piece in pieces for entry in piece.metadata]
        scores, _ = worker.score(self._spec.name, images, prompts, metadata, self._timeout_s)
        with self._changed:
            self._counts.update(pictures=len(images), batches=1)
        return scores


def _settle(piece: Piece, result: Scores | ScoringFailed) -> None:
    """Set a piece's result, if its request still waits."""
    try:
        (
            piece.scores.set_exception(result)
            if isinstance(result, Exception)
            else piece.scores.set_result(result)
        )
    except InvalidStateError:  # cancelled meanwhile
        pass
