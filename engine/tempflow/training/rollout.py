"""Rolls out an iteration: integrates every row, decodes it when it reaches sigma 0, and hands the
image to the reward workers.

`roll_out` returns the states or endpoints to train on while images are still being scored.
`gather_rewards` waits for the scores and shares them with all ranks.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Callable

import numpy as np
import torch

from tempflow.config import Suffix
from tempflow.media import without_missing
from tempflow.objectives import Rollout
from tempflow.profiling import span
from tempflow.rewards import combine
from tempflow.run.diversity import thumbnails_there
from tempflow.run.failures import check_failed
from tempflow.sampling.denoise import Denoise
from tempflow.sampling.layout import Forest, Layout, iteration_units
from tempflow.sampling.noise import Noise
from tempflow.sampling.plans.base import Plan
from tempflow.sampling.scheduler import Stats, eager, integrate
from tempflow.sampling.steps import Grid
from tempflow.sampling.suffix import count_forwards
from tempflow.training import distributed
from tempflow.training.image_distances import colors, diversity, novelty
from tempflow.training.reward_maps import maps
from tempflow.training.session import Session
from tempflow.transfer import Fetched, Mark
from tempflow.types import Endpoint, Rewards, Row, State


@dataclass(frozen=True)
class RolledOut:
    """A rollout whose images have been handed to the reward workers."""

    layout: Layout
    """The rows of all ranks."""
    forest: Forest
    """The rows of this rank."""
    kept: Rollout
    """The states or endpoints to train on."""
    images: Images
    """The images of this rank."""
    stats: Stats
    """Counts of this rank's forwards."""
    seconds: dict[str, float]
    """Seconds of this rank for "rollout" and "decode"."""


@dataclass
class Images:
    """Images of rows that reached sigma = 0, in the order in which they were decoded."""

    rows: list[int] = field(default_factory=list)
    """The row of each image, as its place in the rank's forest."""
    tickets: list = field(default_factory=list)
    """The reward pool's tickets, one for each batch."""
    thumbnails: list[np.ndarray] = field(default_factory=list)
    """float32 [D] for each image; NaN where the image is not finite."""
    not_finite: int = 0
    """The number of images that hold NaN or infinity."""
    seconds: float = 0.0
    """Seconds of decoding."""


@dataclass(frozen=True)
class Scored:
    """The rewards of an iteration and the metrics that come with them. Arrays are of all ranks."""

    rewards: Rewards
    images: int
    """The number of images of all ranks."""
    failed: int
    """The number of images that have no reward."""
    trunk: float
    """Mean reward of the rows that belong to no slot, such as trunks; NaN if there are none."""
    diversity: dict[str, float]
    """Mean distances between images, by metric."""
    seconds: dict[str, float]
    """Seconds of this rank: waiting for rewards, and the workers' computing."""
    by_row: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 [rows of all units]: the weighted sum of each row's rewards; NaN where one failed."""


def plan_iteration(
    session: Session, prompt_ids: list[int], iteration: int, plan: Plan | None = None
) -> Layout:
    """The rows of all units of an iteration, the same on every rank.

    Args:
        session: the run.
        prompt_ids: places of the iteration's prompts in the prompt file.
        iteration: its number.
        plan: used instead of the session's plan.
    """
    units = iteration_units(prompt_ids, session.plan.seeds)
    rows = [(plan or session.plan).rows(unit, iteration) for unit in units]
    return Layout(units, rows, endpoints=session.objective.wants == "endpoints")


def my_units(layout: Layout) -> list[int]:
    """Places of this rank's units: every world-size-th one."""
    return list(range(len(layout.units)))[distributed.rank() :: distributed.world_size()]


def count_rows(session: Session, layout: Layout, suffix: Suffix | None) -> int:
    """The number of rows that this rank will forward, for the progress display."""
    return count_forwards(
        layout.forest(my_units(layout)).rows, session.config.rollout.num_steps, suffix
    )


@torch.no_grad()
def roll_out(
    session: Session,
    layout: Layout,
    iteration: int,
    suffix: Suffix | None = None,
    advance: Callable[[int], None] = lambda n: None,
    levels: list[float] | None = None,
) -> RolledOut | None:
    """Integrate this rank's units and hand their images to the reward workers (a collective).

    Args:
        session: the run.
        layout: of `plan_iteration`.
        iteration: its number, which the grid and the noise depend on.
        suffix: how rows continue after their last noise; None: exactly.
        advance: is called with the number of rows after each forward.
        levels: factors of the noise of every step, [T]; None: 1.

    Returns:
        The rollout; None, on every rank, if a stop was requested on any rank.
    """
    started = time.perf_counter()
    chosen = my_units(layout)
    forest, noise, grid = (
        layout.forest(chosen),
        Noise(session.config.training.seed, iteration),
        session.grid_of(iteration, levels),
    )
    with span("rollout", rows=len(forest.rows)):
        lanes = _roll_lanes(session, layout, chosen, forest, grid, noise, suffix, advance)
    # A rank must not leave alone: the others would wait for its rewards.
    if distributed.reduce(session.stop() or any(lane.stopped for lane in lanes), "max"):
        return None
    images = _merge_images([lane.images for lane in lanes])
    # Lanes finish in any order. Sorted, so that micro-batches do not depend on their pace.
    states = sorted(
        (s for lane in lanes for s in lane.states), key=lambda s: (s.unit.index, s.step)
    )
    endpoints = sorted((e for lane in lanes for e in lane.endpoints), key=lambda e: e.slot)
    stats = sum((lane.stats for lane in lanes[1:]), lanes[0].stats)
    # Decoding is measured on the device and reported apart from the rest.
    seconds = {"rollout": time.perf_counter() - started - images.seconds, "decode": images.seconds}
    kept = Rollout(layout.slots, states, endpoints, grid, noise, session.advantage.over)
    return RolledOut(layout, forest, kept, images, stats, seconds)


@dataclass(frozen=True)
class _Decoded:
    """A batch of images whose decoding was launched on the device, and perhaps has not finished."""

    rows: list[int]
    """The row of each image, as its place in the lane's forest."""
    fetched: Fetched
    """On their way to the host: images, whether each is finite, thumbnails."""
    started: Mark
    """The moment before the decoding."""
    ended: Mark
    """The moment after it."""


class _Lane:
    """A share of a rank's rows, with its own batches of latents and images.

    So its results do not depend on the pace of the other lanes.

    Args:
        session: the run.
        forest: the lane's rows.
        places: their places in the forest of the rank.
    """

    def __init__(self, session: Session, forest: Forest, places: list[int]):
        self.session, self.forest, self.places = session, forest, places
        self.images, self.stats, self.stopped = Images(), Stats(), False
        self.states: list[State] = []
        self.endpoints: list[Endpoint] = []
        self._waiting: list[tuple[int, torch.Tensor]] = []  # (row, latent) not decoded yet
        self._decoded: deque[_Decoded] = deque()

    def run(
        self, denoise: Denoise, grid: Grid, noise: Noise, suffix: Suffix | None, advance, lock: Lock
    ) -> _Lane:
        """Roll out the lane's rows to the end, or to a stop; returns the lane.

        Args:
            denoise: forwards and steps.
            grid: the iteration's sampling grid.
            noise: the iteration's noise.
            suffix: as of `roll_out`.
            advance: as of `roll_out`.
            lock: held around calls of `advance` and of the reward pool, which the lanes share.
        """
        s, r = self.session, self.session.config.rollout
        # Graphs and compiled code are made for one shape: small batches are padded to full ones.
        pad = s.graphs is not None or r.compile != "eager"
        for arrived in integrate(
            self.forest,
            denoise,
            grid,
            noise,
            micro_batch=r.rows,
            suffix=suffix,
            execute=eager if s.graphs is None else s.graphs,
            pad=pad,
        ):
            self.stats = arrived.stats
            self._keep(arrived)
            with lock:
                advance(arrived.forwards)
            # Under ZeRO-3 without a rollout copy a forward is a collective, so a rank that stopped
            # here would leave the others waiting.
            if r.replica and s.stop():
                self.stopped = True
                return self
            # Fetches images that were decoded before this forward was launched. The host waits for
            # them here, while the GPU has this forward to compute.
            self._submit_all(lock)
            while len(self._waiting) >= r.decode_batch:
                self._decode()
            # Without waiting: on a CPU images are always ready, on a GPU some may be.
            while self._decoded and self._decoded[0].fetched.ready():
                self._submit(lock)
        # The last images. One decoding stays under way, so that the GPU has work during each wait.
        while self._waiting:
            self._decode()
            while len(self._decoded) > 1 or self._decoded and self._decoded[0].fetched.ready():
                self._submit(lock)
        self._submit_all(lock)
        return self

    def _keep(self, arrived) -> None:
        """Keep what a forward brought: finished latents to decode, and states or endpoints."""
        if arrived.rows:
            self._waiting += list(zip(arrived.rows, arrived.latents, strict=True))
        if self.session.objective.wants == "states":
            self.states += arrived.states
            return
        for n, latent in zip(arrived.rows, arrived.latents if arrived.rows else [], strict=True):
            self.endpoints.append(
                Endpoint(self.forest.rows[n].unit, latent, self.forest.numbers[n])
            )

    def _decode(self) -> None:
        """Launch the decoding of the next images and their transfer to the host."""
        s = self.session
        size = s.config.rollout.decode_batch
        part, self._waiting = self._waiting[:size], self._waiting[size:]
        started = Mark(s.policy.device)
        with span("decode", rows=len(part)):
            images, finite = s.sampler.pixels(torch.stack([x for _, x in part]))
            small = thumbnails_there(images)  # on the device, not later on the host
        # Recorded before the copies: when these are waited for, this moment has passed.
        ended = Mark(s.policy.device)
        fetched = Fetched([images, finite, small])
        self._decoded.append(_Decoded([n for n, _ in part], fetched, started, ended))

    def _submit_all(self, lock: Lock) -> None:
        """Wait for all images under way and hand them to the reward workers."""
        while self._decoded:
            self._submit(lock)

    def _submit(self, lock: Lock) -> None:
        """Wait for the oldest images under way and hand them to the reward workers."""
        s, oldest = self.session, self._decoded.popleft()
        images, finite, small = (tensor.numpy() for tensor in oldest.fetched.wait())
        images = without_missing(images, finite)
        self.images.seconds += oldest.started.seconds_to(oldest.ended)
        prompts = [s.prompts[self.forest.rows[n].unit.prompt_id] for n in oldest.rows]
        self.images.rows += [self.places[n] for n in oldest.rows]
        # Watched rewards are computed in evaluations only; images that are not finite are masked.
        asked: dict[str, Any] = {"finite": finite, "rewards": [spec.name for spec in s.trained]}
        with lock:  # in-process rewards are not required to be thread-safe
            self.images.tickets.append(
                s.pool.submit(
                    images, [p.text for p in prompts], [p.for_rewards for p in prompts], **asked
                )
            )
        self.images.not_finite += int((~finite).sum())
        self.images.thumbnails += list(np.where(finite[:, None], small, np.float32(np.nan)))


def _roll_lanes(
    session: Session,
    layout: Layout,
    chosen: list[int],
    forest: Forest,
    grid,
    noise,
    suffix,
    advance,
) -> list[_Lane]:
    """Split this rank's units into lanes and run them, in a thread each if there are several."""
    denoise = _denoise(session, forest.rows, suffix)
    if session.graphs is not None:
        own, denoiser = (
            session.float8.tensors() if session.float8 else (),
            session.policy.denoiser(),
        )
        # Graphs read weights at the addresses of their capture; moved ones must be captured again.
        session.graphs.watch((*denoiser.parameters(), *denoiser.buffers(), *own))
    place = {number: n for n, number in enumerate(forest.numbers)}
    lanes = []
    for first in range(min(session.lanes, len(chosen)) or 1):
        part = layout.forest(chosen[first :: session.lanes])
        lanes.append(_Lane(session, part, [place[number] for number in part.numbers]))
    lock = Lock()
    if len(lanes) == 1:
        return [lanes[0].run(denoise, grid, noise, suffix, advance, lock)]
    # Lanes share the rank's cores; more threads than cores would wait for each other.
    threads = max(1, torch.get_num_threads() // len(lanes))

    def run(lane: _Lane) -> _Lane:
        with torch.no_grad():  # per thread: the decorator of `roll_out` does not reach this one
            return lane.run(denoise, grid, noise, suffix, advance, lock)

    with ThreadPoolExecutor(len(lanes), "lane", torch.set_num_threads, (threads,)) as pool:
        return list(pool.map(run, lanes))


def _denoise(session: Session, rows: list[Row], suffix: Suffix | None) -> Denoise:
    """The forwards of this rank's rows, with the conditioning of their prompts on the device."""
    # Each prompt once, in order of first appearance.
    places = {id: i for i, id in enumerate(dict.fromkeys(row.unit.prompt_id for row in rows))}
    coarse = None
    if suffix and suffix.weights == "float8":
        assert session.float8  # made with the session if the suffix asks for it
        # The weights have changed since the last iteration.
        session.float8.refresh()
        coarse = session.float8.transformer
    conditions = session.embeddings.each([session.prompts[id] for id in places])
    return Denoise(session.sampler, session.policy.denoiser(), conditions, places, coarse)


def _merge_images(lanes: list[Images]) -> Images:
    """The images of all lanes, in the order of the lanes. Seconds are a mean over lanes, which
    decode at the same time."""
    whole = Images()
    for lane in lanes:
        whole.rows += lane.rows
        whole.tickets += lane.tickets
        whole.thumbnails += lane.thumbnails
        whole.not_finite += lane.not_finite
        whole.seconds += lane.seconds / len(lanes)
    return whole


# ------------------------------------------------------------------------------------------ rewards
def gather_rewards(session: Session, rolled: RolledOut) -> Scored:
    """Wait for the scores of an iteration and share them with all ranks (a collective).

    Raises:
        TooManyFailed: more images than `reward_pool.max_failed` allows have no reward.
    """
    waiting = time.perf_counter()
    with span("reward"):
        scores = session.pool.gather(rolled.images.tickets)
    seconds = {
        "reward": time.perf_counter() - waiting,
        "reward_busy": sum(t.seconds for t in rolled.images.tickets),
    }
    combined = [combine(score, session.trained) for score in scores]
    columns = [np.concatenate([c.values for c in combined])]
    columns += [np.concatenate([c.parts[spec.name] for c in combined]) for spec in session.trained]
    # [1 + R, rows of all ranks]: the weighted sum, then each reward. Rows of other ranks are 0, so
    # that the sum over ranks puts every row in its place with its own bits.
    mine = np.zeros((len(columns), len(rolled.layout)))
    mine[:, [rolled.forest.numbers[n] for n in rolled.images.rows]] = columns
    # float32, the dtype in which rewards are returned.
    trunks = mine[0, np.intersect1d(rolled.forest.numbers, rolled.layout.without_slot)].astype(
        np.float32
    )
    totals = [
        len(rolled.forest.rows),
        np.isnan(columns[0]).sum(),
        rolled.images.not_finite,
        np.nansum(trunks),
        np.isfinite(trunks).sum(),
    ]
    images, failed, not_finite, trunk_sum, trunk_count = distributed.reduce(totals)
    # Of all ranks together, so that all raise or none does.
    check_failed(
        "this iteration",
        int(images),
        int(failed),
        int(not_finite),
        session.config.reward_pool.max_failed,
        distributed.first_of_any(session.pool.last_error),
    )
    trunk = trunk_sum / trunk_count if trunk_count else float("nan")
    rewards = distributed.reduce(mine)
    by_slot = replace(
        _by_slot(session, rolled.layout, rewards),
        novelty=novelty(session, rolled),
        maps=maps(session, rolled, scores),
        colors=colors(session, rolled),
    )
    return Scored(by_slot, int(images), int(failed), trunk, diversity(rolled), seconds, rewards[0])


def _by_slot(session: Session, layout: Layout, rewards: np.ndarray) -> Rewards:
    """Rewards by slot from those by row, float64 [1 + R, rows]."""
    total, *parts = layout.slots.means(rewards)
    before, after = layout.slots.values(rewards[0])
    prompts = np.array([unit.prompt_id for unit in layout.units[:: session.plan.seeds]])[
        layout.slots.prompt
    ]
    return Rewards(
        total,
        {spec.name: part for spec, part in zip(session.trained, parts, strict=True)},
        {spec.name: spec.weight for spec in session.trained},
        {spec.name: session.fitting[prompts, n] for n, spec in enumerate(session.trained)},
        before,
        after,
    )
