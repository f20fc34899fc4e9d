"""One iteration's data: run the plan of this rank's units, decode and score what finishes, share the rewards."""

from __future__ import annotations

import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Callable

import numpy as np
import torch

from tempflow.config import Config, Suffix
from tempflow.models import Policy, index_rows
from tempflow.models.embeddings import EmbeddingCache
from tempflow.profiling import span
from tempflow.rewards import RewardPool, RewardSpec, combine
from tempflow.run.diversity import mean_distance, thumbnails
from tempflow.run.failures import check_failed
from tempflow.sampling.float8 import Float8Copy
from tempflow.sampling.graphs import CudaCapture, GraphCache
from tempflow.sampling.plans import RowPlan as Plan
from tempflow.sampling.plans import Unit, build_plan, iteration_units, split_plan
from tempflow.sampling.scheduler import Decision, RolloutStats, RowScheduler
from tempflow.sampling.steps import Coefficients
from tempflow.sampling.suffix import count_forwards
from tempflow.training import distributed as comm
from tempflow.training.device import cores_per_rank
from tempflow.training.engine import compile_blocks
from tempflow.types import Example, Size


class Stopped(Exception):
    """A stop was asked for during a rollout, which is given up."""


@dataclass
class Collected:
    """decisions: this rank's. rewards: [P, S, K, B] of all ranks, NaN where scoring failed. steps: the K steps.

    parts: each reward that is trained on alone, unweighted, in the same shape. diversity: mean distances between pictures
    (see `tempflow.run.diversity`) by metric. times: seconds of this rank. exact_rewards, exact_parts: of the same rows with the
    exact suffix, in iterations that audit a coarser one.
    """

    decisions: list[Decision]
    rewards: np.ndarray
    steps: list[int]
    parts: dict[str, np.ndarray]
    diversity: dict[str, float]
    trunk_reward: float
    images: int
    failed: int
    stats: RolloutStats
    times: dict[str, float]
    exact_rewards: np.ndarray | None = None
    exact_parts: dict[str, np.ndarray] | None = None


class _Finished:
    """Gathers rows that reached sigma = 0, decodes them in batches and hands the pictures to the pool."""

    def __init__(self, collector: Collector, plan: Plan):
        self.collector, self.plan = collector, plan
        self.rows: list[int] = []
        self.tickets: list = []
        self.thumbnails: list[np.ndarray] = []
        self.not_finite = 0
        self.decode_seconds = 0.0
        self._waiting: list[tuple[int, torch.Tensor]] = []

    @classmethod
    def joined(cls, collector: Collector, plan: Plan, lanes: list[_Finished]) -> _Finished:
        """What several lanes finished, in the order of the lanes; decode_seconds: of one of them on average."""
        whole = cls(collector, plan)
        for lane in lanes:
            whole.rows += lane.rows
            whole.tickets += lane.tickets
            whole.thumbnails += lane.thumbnails
            whole.not_finite += lane.not_finite
            whole.decode_seconds += lane.decode_seconds / len(lanes)
        return whole

    def add(self, indices: list[int], latents: torch.Tensor) -> None:
        self._waiting += list(zip(indices, latents, strict=True))
        while len(self._waiting) >= self.collector.config.rollout.decode_batch:
            self._send()

    def drain(self) -> None:
        """Send what is left."""
        while self._waiting:
            self._send()

    def _send(self) -> None:
        size = self.collector.config.rollout.decode_batch
        part, self._waiting = self._waiting[:size], self._waiting[size:]
        started = time.perf_counter()
        with span("decode", rows=len(part)):
            images, finite = self.collector.sampler.decode(torch.stack([x for _, x in part]))
        self.decode_seconds += time.perf_counter() - started
        chosen = [self.collector.prompts[self.plan.rows[i].unit.prompt_id] for i, _ in part]
        self.rows += [i for i, _ in part]
        texts, metadata = [p.text for p in chosen], [p.metadata for p in chosen]
        asked = {"finite": finite, "rewards": [spec.name for spec in self.collector.trained]}
        with self.collector.submitting:  # rewards in this process are not required to be thread-safe
            self.tickets.append(self.collector.pool.submit(images, texts, metadata, **asked))
        self.not_finite += int((~finite).sum())
        self.thumbnails += list(np.where(finite[:, None], thumbnails(images), np.float32(np.nan)))


class Collector:
    """Rollouts of one run."""

    def __init__(self, config: Config, policy: Policy, prompts: list[Example], embeddings: EmbeddingCache,
                 pool: RewardPool, specs: list[RewardSpec], should_stop=lambda: False,
                 note: Callable[[str], None] = print, graphs: GraphCache | bool = True):  # fmt: skip
        """graphs: what captures forwards; True: what `rollout.graphs` says, False: nothing."""
        self.config, self.policy, self.prompts = config, policy, prompts
        self.embeddings, self.pool, self.should_stop = embeddings, pool, should_stop
        self.trained = [spec for spec in specs if not spec.watched]
        r = config.rollout
        self.sampler = policy.at(Size(r.height, r.width), r.guidance_scale)
        self.latent_shape = self.sampler.latent_shape
        self.sigmas = self.sampler.sigmas(r.num_steps)
        self.sde: Coefficients = config.sde().coefficients(self.sigmas)
        self.submitting = Lock()
        self.lanes = r.lanes or (cores_per_rank() if policy.device.type == "cpu" and r.replica else 1)
        self._float8: Float8Copy | None = None
        if r.suffix and r.suffix.weights == "float8":
            self._float8 = self._make_float8()
        self.graphs = None if isinstance(graphs, bool) else graphs
        if graphs is True and r.graphs and policy.device.type == "cuda":
            self.graphs = GraphCache(CudaCapture(), limit_bytes=r.graph_limit_mb << 20, verify=r.graph_verify, note=note)
        elif graphs is True and r.graphs:
            note("rollout.graphs: no GPU, so rollouts run eagerly")

    def _make_float8(self) -> Float8Copy:
        made = Float8Copy(self.policy.denoiser())
        compile_blocks(made.transformer, self.config.rollout.compile)
        return made

    def my_units(self, prompt_ids: list[int]) -> list[Unit]:
        """Units dealt to this rank: every world-size-th."""
        return iteration_units(prompt_ids, self.config.plan().seeds)[comm.rank() :: comm.world_size()]

    def forwards(self, prompt_ids: list[int], iteration: int) -> int:
        """Rows that this rank will forward in an iteration."""
        r = self.config.rollout
        plan = build_plan(self.config, self.my_units(prompt_ids), iteration)
        again = count_forwards(plan, r.num_steps, None) if self._audits(iteration) else 0
        return count_forwards(plan, r.num_steps, r.suffix) + again

    def _audits(self, iteration: int) -> bool:
        suffix = self.config.rollout.suffix
        return suffix is not None and suffix.audit_every > 0 and iteration % suffix.audit_every == 0

    @torch.no_grad()
    def collect(self, iteration: int, prompt_ids: list[int], advance=lambda n: None) -> Collected:
        """Roll out and score one iteration (collective in its last part). Raises Stopped on every rank together."""
        plan = build_plan(self.config, self.my_units(prompt_ids), iteration)
        data = self.run_plan(plan, iteration, len(prompt_ids), self.config.rollout.suffix, advance)
        if self._audits(iteration):
            started = time.perf_counter()
            exact = self.run_plan(plan, iteration, len(prompt_ids), None, advance)
            data.exact_rewards, data.exact_parts = exact.rewards, exact.parts
            data.times["audit"] = time.perf_counter() - started
        return data

    def run_plan(self, plan: Plan, iteration: int, prompts: int, suffix: Suffix | None, advance=lambda n: None) -> Collected:
        """Roll out a plan of an iteration of `prompts` prompts with any suffix, and score it (a collective)."""
        started = time.perf_counter()
        stopped, finished, decisions, stats = False, _Finished(self, plan), [], RolloutStats()
        try:
            with span("rollout", rows=len(plan.rows)):
                finished, decisions, stats = self._roll_out(plan, iteration, suffix, advance)
        except Stopped:
            stopped = True
        rollout_seconds = time.perf_counter() - started - finished.decode_seconds
        if comm.reduce(stopped or self.should_stop(), "max"):
            raise Stopped
        waiting = time.perf_counter()
        with span("reward"):
            scores = self.pool.gather(finished.tickets)
        waited = time.perf_counter() - waiting
        times = {"rollout": rollout_seconds, "decode": finished.decode_seconds, "reward": waited,
                 "reward_busy": sum(ticket.seconds for ticket in finished.tickets), "audit": 0.0}  # fmt: skip
        return self._share(plan, finished, scores, prompts, decisions, stats, times)

    def _roll_out(self, plan: Plan, iteration: int, suffix: Suffix | None, advance):
        """Every lane has its own scheduler and batches, so that what a lane computes does not depend on the others' pace."""
        r = self.config.rollout
        places = {id: i for i, id in enumerate(dict.fromkeys(row.unit.prompt_id for row in plan.rows))}
        chosen = [self.prompts[id] for id in places]
        conditioning = self.embeddings.get(chosen)
        parts = split_plan(plan, self.lanes) or [(plan, [])]
        threads = max(1, torch.get_num_threads() // len(parts))
        velocity, suffix_velocity = partial(self._velocity, self.policy.denoiser()), None
        if suffix and suffix.weights == "float8":
            self._float8 = self._float8 or self._make_float8()
            self._float8.refresh()
            suffix_velocity = partial(self._velocity, self._float8.transformer)

        def conditioning_of(units):
            # Under ZeRO-3 without a replica a forward is a collective, which no rank may leave alone.
            if r.replica and self.should_stop():
                raise Stopped
            return index_rows(conditioning, [places[unit.prompt_id] for unit in units])

        def told(n: int) -> None:
            with self.submitting:
                advance(n)

        def run(part: Plan, rows: list[int]):
            finished = _Finished(self, plan)
            scheduler = RowScheduler(
                part, conditioning_of, velocity, self.sigmas, self.sde, r.micro_batch, self.config.training.seed, iteration,
                lambda indices, latents: finished.add([rows[i] for i in indices], latents), told, self.policy.device,
                suffix, suffix_velocity, pad=self.graphs is not None or r.compile != "eager",
            )  # fmt: skip
            if self.graphs is not None:
                own = self._float8.tensors() if self._float8 else ()
                self.graphs.watch((*self.policy.denoiser().parameters(), *self.policy.denoiser().buffers(), *own))
                scheduler.run = self.graphs
            decisions = scheduler.roll_out(self.latent_shape)
            finished.drain()
            return finished, decisions, scheduler.stats

        if len(parts) == 1:
            results = [run(*parts[0])]
        else:
            with ThreadPoolExecutor(len(parts), "lane", torch.set_num_threads, (threads,)) as lanes:
                results = list(lanes.map(run, *zip(*parts, strict=True)))
        finished, decisions, stats = zip(*results, strict=True)
        return (_Finished.joined(self, plan, finished), sorted((d for ds in decisions for d in ds), key=lambda d: (d.unit.index, d.step)),
                sum(stats[1:], stats[0]))  # fmt: skip

    def _velocity(self, transformer, x, sigma, **conditioning):
        return self.sampler.velocity(transformer, x, sigma, conditioning)

    def _share(self, plan: Plan, finished: _Finished, scores, prompts: int, decisions, stats, times) -> Collected:
        """Every rank's rewards in one array on every rank."""
        combined = [combine(score, self.trained) for score in scores]
        columns = [np.concatenate([c.values for c in combined])]
        columns += [np.concatenate([c.parts[spec.name] for c in combined]) for spec in self.trained]
        values = dict(zip(finished.rows, np.stack(columns, axis=1), strict=True))  # the sum, then each reward
        mine = np.zeros((len(columns), prompts, self.config.plan().seeds, len(plan.steps), plan.width))
        trunks = []
        for index, row in enumerate(plan.rows):
            taken = [plan.steps.index(k) for k in sorted(row.noise)]
            if taken:
                mine[:, row.unit.prompt, row.unit.seed, taken, row.child] = values[index][:, None]
            else:
                trunks.append(values[index][0])
        totals = [len(plan.rows), np.isnan(columns[0]).sum(), finished.not_finite, np.nansum(trunks), np.isfinite(trunks).sum()]
        images, failed, not_finite, trunk_sum, trunk_count = comm.reduce(totals)
        check_failed("this iteration", int(images), int(failed), int(not_finite), self.config.reward_pool.max_failed,
                     comm.first_of_any(self.pool.last_error))  # fmt: skip
        rewards, *parts = comm.reduce(mine)
        return Collected(
            decisions, rewards, plan.steps, {spec.name: part for spec, part in zip(self.trained, parts, strict=True)},
            self._diversity(plan, finished, prompts), trunk_sum / trunk_count if trunk_count else float("nan"),
            int(images), int(failed), stats, times,
        )  # fmt: skip

    def _diversity(self, plan: Plan, finished: _Finished, prompts: int) -> dict[str, float]:
        """Mean distances between a prompt's pictures of different seeds, and between the children of one state."""
        seen = np.stack(finished.thumbnails)[np.argsort(finished.rows)]  # by row
        seeds, found = self.config.plan().seeds, {}
        if seeds > 1:  # a prompt's seeds lie on several ranks
            roots = np.zeros((prompts, seeds, seen.shape[1]), dtype=np.float32)
            for thumbnail, row in zip(seen, plan.rows, strict=True):
                if row.parent is None:
                    roots[row.unit.prompt, row.unit.seed] = thumbnail
            found["diversity/seeds"] = _mean_of_known(mean_distance(comm.reduce(roots)))
        if plan.width > 1:
            siblings = defaultdict(list)
            for i, row in enumerate(plan.rows):
                if row.parent is not None:
                    siblings[row.unit.prompt, row.unit.seed, plan.steps.index(row.start)].append(i)
            apart = np.zeros((prompts, seeds, len(plan.steps)))
            for place, members in siblings.items():
                apart[place] = mean_distance(seen[members])
            found["diversity/children"] = _mean_of_known(comm.reduce(apart))
        return found


def _mean_of_known(values: np.ndarray) -> float:
    """Of groups that have a pair of images; NaN where none has."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
