"""The training loop: collect, advantages, updates, refresh; and around it evaluation, checkpoints, records.

Everything an iteration depends on is a function of the config, the iteration's number and the weights, so a resumed run
repeats what an undisturbed one would have done.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from tempflow.advantages import Advantages, rank_correlation
from tempflow.checkpoints import load, save
from tempflow.config import Config
from tempflow.data.curation import Curation
from tempflow.data.prompts import PromptOrder, digests
from tempflow.errors import RankError, UserError, shown
from tempflow.models.embeddings import open_policy
from tempflow.profiling import Profile, span
from tempflow.rewards import RewardPool, RewardSpec, fits, kinds_of, probe
from tempflow.run import evaluation
from tempflow.run.byproducts import ByProducts
from tempflow.run.console import Console
from tempflow.run.environment import describe, device_name, versions
from tempflow.run.failures import TooManyFailed, check_failed
from tempflow.run.logs import METRICS_FILE, MetricsLog, read_metrics, write_atomic
from tempflow.run.means import mean_of
from tempflow.run.stopping import StopRule
from tempflow.run.trackers import Trackers
from tempflow.sampling.plans import Unit
from tempflow.sampling.steps import noise_weights
from tempflow.training import distributed as comm
from tempflow.training.batches import Batch, make_batches, padding_of, select
from tempflow.training.device import Threads, device
from tempflow.training.distributed import on_first_rank
from tempflow.training.ema import Average
from tempflow.training.engine import Runtime
from tempflow.training.rehearsal import may_capture
from tempflow.training.rollout import Collected, Collector, Stopped
from tempflow.training.signals import StopSignal
from tempflow.training.update import Updater
from tempflow.types import Example, Size


class Trainer:
    """One run. `run()` trains to the end, or to a signal; the run directory must have been claimed (`directory.claim`).

    report(run_dir) is called on rank 0 after each evaluation, to draw the run so far; it returns the file it wrote.
    """

    def __init__(self, config: Config, run_dir: Path, train: list[Example], heldout: list[Example],
                 specs: list[RewardSpec], stop: StopSignal, report: Callable[[Path], Path],
                 profile: Profile | None = None):  # fmt: skip
        self.config, self.run_dir, self.stop, self.report = config, run_dir, stop, report
        self.profile = profile or Profile(None)
        self.prompts, self.heldout, self.specs = train, heldout[: config.eval.prompts], specs
        self.threads = Threads(config)
        self.pool = RewardPool(specs, **config.reward_pool.pool())
        self.console: Console | None = None
        self.order = PromptOrder(len(train), config.data.prompts_per_iteration, config.training.seed)
        choice = config.data.curation
        self.fitting = fits([spec for spec in specs if not spec.watched], [p.metadata for p in train])
        self.curation = Curation(choice, self.order, config.advantage().over, kinds_of(self.fitting)) if choice else None
        units = config.data.prompts_per_iteration * config.plan().seeds
        if units < comm.world_size():
            raise UserError(f"data.prompts_per_iteration x rollout.plan.seeds: {units} units for {comm.world_size()} ranks")
        if self.heldout and len(self.heldout) < comm.world_size():
            raise UserError(f"data.heldout, eval.prompts: {len(self.heldout)} prompts for {comm.world_size()} ranks")
        self._check_equal_shares(units)
        self.byproducts = ByProducts()
        self.trackers = on_first_rank(self._open_trackers) or Trackers(run_dir)
        reached = range(len(train)) if self.curation else self.order.reached(config.training.iterations)
        self._note(describe(comm.world_size()))
        graphs = may_capture(config, device(), self._note)
        self.policy, self.embeddings = open_policy(config, [train[i] for i in reached] + self.heldout, device(), self._note)
        self.runtime = Runtime(config, self.policy)
        ema = config.training.ema
        self.ema = Average(self.runtime, ema.decay, ema.every) if ema else None
        self.collector = Collector(config, self.policy, train, self.embeddings, self.pool, specs, stop, self._note, graphs)
        self.updater = Updater(config, self.runtime, self._embed)
        self.iteration, self.elapsed, self.images, self.skipped_in_a_row = 0, 0.0, 0, 0
        self.saved = 0  # iteration of the newest checkpoint; before the first update there is nothing to save
        self.base_reward: float | None = None
        self.base_rewards: np.ndarray | None = None  # of each held-out prompt, [n]: gains are measured prompt by prompt
        self.last_row: dict | None = None  # of this process
        self.rule = StopRule(config.eval.stop) if config.eval.stop else None
        self.ended: str | None = None  # by the rule, for which reason
        self.evaluated_at, self.evaluation = -1, {}
        self._probe_rewards()

    def _probe_rewards(self) -> None:
        """Refuse a reward that answers anything but numbers before the base is evaluated; one rank's test speaks for all."""
        self.pool.wait_ready()
        trouble, prompts, r = None, self.heldout + self.prompts, self.config.rollout
        if comm.rank() == 0:
            try:
                probe(self.pool, self.specs, [p.text for p in prompts], [p.metadata for p in prompts], Size(r.height, r.width))
            except UserError as error:
                trouble = str(error)
        if trouble := comm.agree_on(trouble):
            raise UserError(trouble)

    def _check_equal_shares(self, units: int) -> None:
        """Under ZeRO-3 a forward of the engine is a collective: a rank with fewer of them would leave the others waiting."""
        stage = self.config.deepspeed.get("zero_optimization", {}).get("stage", 0)
        if self.config.rollout.replica or stage < 3:
            return
        shared = {"data.prompts_per_iteration x rollout.plan.seeds": units}
        if self.config.eval.every:
            shared["data.heldout, eval.prompts"] = len(self.heldout)
        for key, count in shared.items():
            if count % comm.world_size():
                raise UserError(
                    f"{key}: {count} for {comm.world_size()} ranks; with rollout.replica false under ZeRO-3 every rank must "
                    "have as many"
                )

    def _open_trackers(self) -> Trackers:
        """Before the model is loaded: what is wrong with their settings is said at once."""
        chosen = self.config.logging
        return Trackers(self.run_dir, tensorboard=chosen.tensorboard, wandb=chosen.wandb, byproducts=self.byproducts)

    def _note(self, text: str) -> None:
        if comm.rank() == 0:
            self.console.note(text) if self.console else print(text)

    def _embed(self, units) -> dict[str, torch.Tensor]:
        return self.embeddings.get([self.prompts[unit.prompt_id] for unit in units])

    # ------------------------------------------------------------------------------------------------------ run
    def run(self, resume_from: Path | None) -> dict | None:
        """Train; returns the summary on rank 0. resume_from: a whole checkpoint of this run."""
        main = comm.rank() == 0
        if resume_from:
            self._restore(resume_from)
        reached = self.iteration if resume_from else -1  # rows past it are of a run that never reached a checkpoint, or go again
        self.log = self._open_log(reached) if main else None
        self.trackers.begin(after=reached)
        t = self.config.training
        self.console = Console(t.iterations, main, start=self.iteration, base_reward=self.base_reward,
                               minutes=t.minutes, elapsed=self.elapsed,
                               watched=[spec.name for spec in self.specs if spec.watched])  # fmt: skip
        with self.console:
            if resume_from and self.rule:
                rows = read_metrics(self.run_dir) if main else []
                self.ended = comm.agree_on(self.rule.replay(rows, self.config.eval.every))
            self._train(first=resume_from is None)
            summary = self._finish() if not self.stop() else None
        if main:
            self.log.close()
            self.trackers.close()
            if summary:
                self.console.summary(summary, self.run_dir)
        self.pool.close()
        return summary

    def _open_log(self, reached: int) -> MetricsLog:
        try:
            log = MetricsLog(self.run_dir)
            log.truncate_after(reached)
        except OSError as error:
            raise RankError(f"{self.run_dir / METRICS_FILE} cannot be written: {error.strerror}") from None
        return log

    def _train(self, first: bool) -> None:
        if first:
            self._judge(self._record({"iteration": 0, **self._evaluate()}))
        while not self._done():
            started = time.perf_counter()
            self.profile.before(self.iteration)
            try:
                with span("iteration", number=self.iteration):
                    metrics = self._iterate()
            except Stopped:
                break
            except TooManyFailed as error:
                self._save_before(error)
                raise
            self.iteration += 1
            spent = time.perf_counter() - started
            self.elapsed += spent
            metrics |= {"iteration": self.iteration, "time/total": spent, "time/elapsed": self.elapsed}
            if self._due(self.config.eval.every):
                try:
                    metrics |= self._evaluate()
                except TooManyFailed as error:
                    self._record(metrics)
                    self._save_before(error)
                    raise
            self._judge(self._record(metrics))
            if self._due(self.config.checkpoint.every):
                self._save()
        self.profile.before(self.iteration)
        if self.saved != self.iteration:
            self._save()
        if comm.reduce(self.stop(), "max"):
            self.stop.received = self.stop.received or "a signal on another rank"
            self.console.note(f"stopped by {self.stop.received} after iteration {self.iteration}; continue with --resume")
        elif self.ended:
            self.console.note(f"stopped after iteration {self.iteration} by {self.ended}; to go on: --resume with another eval.stop")

    def _save_before(self, error: TooManyFailed) -> None:
        """Keep the work so far where the rewards failed; where the model did, the checkpoints before stay as they are."""
        if not error.model_broken and self.saved != self.iteration:
            self._save()

    def _done(self) -> bool:
        """All ranks together: the last iteration, the time limit, the stopping rule, or a signal."""
        t = self.config.training
        over = self.iteration >= t.iterations or (t.minutes is not None and self.elapsed >= 60 * t.minutes)
        return bool(comm.reduce(over or self.ended is not None or self.stop(), "max"))

    def _judge(self, metrics: dict) -> None:
        """Let the stopping rule see an iteration that was evaluated, with one verdict on every rank."""
        if self.rule and self.evaluated_at == self.iteration:
            self.ended = comm.agree_on(self.rule.observe(metrics) if comm.rank() == 0 else None)

    def _due(self, every: int) -> bool:
        return every > 0 and self.iteration % every == 0 and self.iteration < self.config.training.iterations

    def _progress(self) -> float:
        """How far the run is, in [0, 1]: by iterations, or by the time limit where that is nearer."""
        t = self.config.training
        timed = self.elapsed / (60 * t.minutes) if t.minutes else 0.0
        return min(1.0, max(self.iteration / t.iterations, float(comm.reduce(timed, "max"))))

    def _lr_factor(self) -> float:
        floor = self.config.training.lr_decay
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self._progress()))

    # ------------------------------------------------------------------------------------------------ iteration
    def _iterate(self) -> dict:
        t, r = self.config.training, self.config.rollout
        drawn = self.curation.draw(self.iteration) if self.curation else None
        prompt_ids = drawn.indices if drawn else self.order.indices(self.iteration)
        with self.console.phase("rollout", self.collector.forwards(prompt_ids, self.iteration)) as advance:
            with self.threads.shared():
                data = self.collector.collect(self.iteration, prompt_ids, advance)
        fitting = self.fitting[prompt_ids]
        adv = self._advantages(data.rewards, data.parts, fitting)
        started = time.perf_counter()
        batches, total = self._batches(data, adv)
        updates: list[dict] = []
        with self.console.phase("train", t.updates.passes * len(batches)) as advance:
            if self.iteration == 0 and batches:
                self._check_replay(batches[0])
            for u in range(t.updates.passes if batches else 0):
                updates.append(self.updater.update(batches, total, self._lr_factor(), u == 0, advance))
                if updates[-1]["skipped"]:
                    self._skipped(u, updates[-1]["broken"])
                    continue
                self.skipped_in_a_row = 0
                if self.ema:
                    self.ema.update()
        trained = time.perf_counter()
        if r.replica:
            with span("weight sync"):
                self.runtime.refresh(self.policy.denoiser())
        synced = time.perf_counter()
        self.images += data.images
        metrics = self._reward_metrics(data, adv) | self._suffix_metrics(data, adv, fitting) | self._update_metrics(updates)
        if drawn:
            self.curation.update(drawn, self.iteration, data.rewards)
            metrics |= self.curation.metrics(drawn, self.iteration)
        seconds = comm.reduce([*data.times.values(), trained - started, synced - trained], "max")
        names = [*data.times, "train", "sync"]
        return metrics | {f"time/{name}": float(value) for name, value in zip(names, seconds, strict=True)}

    def _advantages(self, rewards: np.ndarray, parts: dict[str, np.ndarray], fitting: np.ndarray) -> Advantages:
        """fitting: bool [P, R], the rewards of `parts` that apply to each prompt."""
        return self.config.advantage()(rewards, parts, {spec.name: spec.weight for spec in self.specs}, fitting)

    def _batches(self, data: Collected, adv: Advantages) -> tuple[list[Batch], int]:
        """This rank's micro-batches, as many as any rank needs, and the decisions of all ranks."""
        t = self.config.training
        chosen = select(data.decisions, adv, data.steps, keep_all=t.penalty is not None)
        most = int(comm.reduce(len(chosen), "max"))
        count = math.ceil(most / t.micro_batch)
        size = math.ceil(most / max(1, count))  # even micro-batches: the least padding
        if count == 0:
            return [], int(np.prod(data.rewards.shape[:3]))
        weights = noise_weights(self.collector.sde.tau, data.steps, t.weighting)
        batches = make_batches(chosen, padding_of(data.decisions), count, size, self.collector.sigmas,
                               self.collector.sde, weights, self.policy.device)  # fmt: skip
        return batches, int(np.prod(data.rewards.shape[:3]))

    def _skipped(self, number: int, broken: list[Unit]) -> None:
        """Say which prompts broke an update; UserError, with the weights saved, when it happens again and again."""
        self.skipped_in_a_row += 1
        gathered = comm.gather_objects([self.prompts[unit.prompt_id].text for unit in broken])
        texts = list(dict.fromkeys(text for texts in gathered or [] for text in texts))
        named = ", ".join(map(shown, texts[:5])) + (" and others" if len(texts) > 5 else "")
        cause = f"log-probabilities of {named}" if texts else "gradient"
        self._note(f"warning: iteration {self.iteration + 1}, update {number + 1} skipped: {cause} not finite; weights unchanged")
        if self.skipped_in_a_row > self.config.training.max_skipped:
            if self.saved != self.iteration:
                self._save()
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row had no finite gradient, more than training.max_skipped "
                f"({self.config.training.max_skipped}) allows; the weights before them are saved. A lower learning rate, or more "
                "precision in the deepspeed section and model.dtype, may help"
            )

    def _check_replay(self, batch: Batch) -> None:
        deviation = float(comm.reduce(self.updater.replay_deviation(batch), "max"))
        clip_high = self.updater.objective.clip_high
        if deviation > 0.1 * clip_high:
            self.console.note(
                f"warning: two passes over the same states with the same weights give ratios up to {deviation:.1e} from 1 "
                f"(clip_high {clip_high:.1e}). Dropout, non-deterministic kernels or too low a "
                "precision in the deepspeed section cause this."
            )

    def _reward_metrics(self, data: Collected, adv: Advantages) -> dict:
        valid = data.rewards[np.isfinite(data.rewards)]
        spread = {f"reward_std/step_{k}": float(s) for k, s in zip(data.steps, adv.spread, strict=True)}
        forwards, batches, padded = comm.reduce([data.stats.forwards, data.stats.batches, data.stats.padded])
        return {
            "reward/mean": float(valid.mean()), "reward/std": float(valid.std()), "reward/trunk": data.trunk_reward,
            **_alone(data.parts), **data.diversity,
            "reward/zero_std_groups": float(adv.zero_spread.mean()), "reward/failed": data.failed,
            "advantage/mean_abs": float(np.abs(adv.values).mean()),
            "images": data.images, "images/total": self.images, "forwards/rollout": int(forwards),
            "rollout/rows_per_forward": forwards / max(batches, 1), "rollout/peak_latents": data.stats.peak_latents,
            "rollout/padded_rows": int(padded),
            **spread,
        }  # fmt: skip

    def _suffix_metrics(self, data: Collected, adv: Advantages, fitting: np.ndarray) -> dict:
        """How well the rewards read after a coarser suffix rank what the exact one would have."""
        if data.exact_rewards is None:
            return {}
        exact = self._advantages(data.exact_rewards, data.exact_parts, fitting)
        both = adv.valid & exact.valid
        return {
            "suffix/reward_rank_correlation": rank_correlation(data.rewards[both], data.exact_rewards[both]),
            "suffix/advantage_rank_correlation": rank_correlation(adv.values[both], exact.values[both]),
        }

    def _update_metrics(self, updates: list[dict]) -> dict:
        lr = self.runtime.learning_rate()
        if not updates:  # no group had any spread: nothing to learn from, and the weights stay
            return {"loss": 0.0, "kl": 0.0, "ratio/max_dev": 0.0, "clip_fraction": 0.0, "clip_fraction/high": 0.0,
                    "clip_fraction/low": 0.0, "grad_norm": 0.0, "forwards/train": 0, "lr": lr}  # fmt: skip
        first, last = updates[0], updates[-1]
        return {
            "updates/skipped": sum(u["skipped"] for u in updates),
            "loss": first["loss"], "kl": last["kl"], "clip_fraction": last["clip_fraction"],
            "clip_fraction/high": last["clip_fraction/high"], "clip_fraction/low": last["clip_fraction/low"],
            "ratio/max_dev": last["ratio/max_dev"], "ratio/min": last["ratio/min"], "ratio/max": last["ratio/max"],
            "ratio/first_max_dev": first["ratio/max_dev"], "mismatch/log_prob": first["mismatch/log_prob"],
            "grad_norm": float(np.mean([u["grad_norm"] for u in updates if not u["skipped"]] or [math.nan])), "lr": lr,
            "forwards/train": sum(u["forwards"] for u in updates),
        }  # fmt: skip

    # ------------------------------------------------------------------------------------- evaluation and records
    @contextmanager
    def _averaged_weights(self):
        """The average in the rollout copy, where one was taken; yields which weights are evaluated."""
        if self.ema is None or not self.config.rollout.replica or not self.ema.taken:
            yield "raw"
            return
        self.runtime.refresh(self.policy.denoiser(), self.ema.gather)
        try:
            yield "ema"
        finally:
            self.runtime.refresh(self.policy.denoiser())

    def _evaluate(self) -> dict:
        if not self.heldout or self.config.eval.every == 0:
            return {}
        r, e = self.config.rollout, self.config.eval
        mine = list(range(len(self.heldout)))[comm.rank() :: comm.world_size()]
        steps = e.num_steps or r.num_steps
        started = time.perf_counter()
        with self._averaged_weights() as weights, self.console.phase("eval", len(mine)) as advance, self.threads.shared():
            drawn = evaluation.draw(
                self.policy.at(Size(r.height, r.width), self.config.eval_guidance()), self.embeddings, self.heldout, mine,
                num_steps=steps, micro_batch=r.micro_batch, decode_batch=r.decode_batch, advance=advance,
            )  # fmt: skip
            scored = evaluation.evaluate(self.pool, self.specs, self.heldout, drawn, e.keep_samples)
        check_failed(f"the evaluation at iteration {self.iteration}", *map(int, comm.reduce(scored.counts())),
                     self.config.reward_pool.max_failed, comm.first_of_any(self.pool.last_error))  # fmt: skip
        self.evaluated_at = self.iteration
        gathered = comm.gather_objects(scored)
        if gathered is None:
            return {}
        scored = evaluation.merge(gathered)
        facts = {"iteration": self.iteration, "num_steps": steps, "seed": evaluation.EVAL_SEED, "weights": weights}
        self.byproducts.attempt("samples", self._show_samples, scored, facts)
        self.evaluation = evaluation.metrics(scored, self.base_rewards) | {"time/eval": time.perf_counter() - started}
        if self.iteration == 0:
            self.base_reward, self.base_rewards = self.evaluation["eval/reward"], scored.reward
        return self.evaluation

    def _show_samples(self, scored: evaluation.Scored, facts: dict) -> None:
        self.trackers.samples(evaluation.replace_samples(self.run_dir, scored, self.heldout, facts))

    def _record(self, metrics: dict) -> dict:
        if comm.rank() != 0:
            return metrics
        self.byproducts.attempt(METRICS_FILE, self.log.append, metrics)
        self.trackers.log(metrics)
        self.console.iteration(metrics)
        if "eval/reward" in metrics:
            self.byproducts.attempt("report.html", self.report, self.run_dir)
        self.last_row = metrics
        return metrics

    def _finish(self) -> dict | None:
        """The last evaluation, the summary and the report."""
        known = self.evaluated_at == self.iteration  # stopped right after an evaluation
        final = self.evaluation if known else self._evaluate()
        if comm.rank() != 0:
            return None
        if final and not known:
            self._merge_into_last_row(final)
        if self.ema and not self.ema.taken:
            self.console.note(f"training.ema: no average was taken in {self.ema.updates} updates (training.ema.every: {self.ema.every}); "
                              "the raw weights were evaluated, and are what will be exported")  # fmt: skip
        summary = {
            "base_reward": self.base_reward, "tuned_reward": final.get("eval/reward"), **_sureness(final, self.base_rewards),
            "minutes": self.elapsed / 60,
            "iterations": self.iteration, "images": self.images, "model": self.config.model.path, "plan": self.config.rollout.plan["type"],
            "device": device_name(), "world_size": comm.world_size(), "versions": versions(), "stopped": self.ended,
        }  # fmt: skip
        self.byproducts.attempt("summary.json", write_atomic, self.run_dir / "summary.json", json.dumps(summary, indent=1))
        if report := self.byproducts.attempt("report.html", self.report, self.run_dir):
            self.console.note(f"report: {report}")
        return summary

    def _merge_into_last_row(self, final: dict) -> None:
        """The final evaluation belongs to the last iteration, which is on record already unless its row was lost."""
        last = self.last_row or next(reversed(read_metrics(self.run_dir)), {})
        kept = last.get("iteration") == self.iteration
        row = {"iteration": self.iteration, **(last if kept else {}), **final}
        self.byproducts.attempt(METRICS_FILE, self.log.replace_last if kept else self.log.append, row)
        self.trackers.log({"iteration": self.iteration, **final})
        self.console.iteration(row)

    # ---------------------------------------------------------------------------------------------- checkpoints
    def _save(self) -> None:
        state = {
            "iteration": self.iteration, "elapsed": self.elapsed, "images": self.images, "base_reward": self.base_reward,
            "base_rewards": None if self.base_rewards is None else [None if np.isnan(x) else float(x) for x in self.base_rewards],
            "curation": self.curation.state() if self.curation else None,
            "ema_updates": self.ema.updates if self.ema else 0, "world_size": comm.world_size(),
            "config": self.config.model_dump(), "prompts": digests(self.prompts, self.heldout), "versions": versions(),
        }  # fmt: skip
        with self.console.phase("checkpoint"), span("checkpoint"):
            kept = self.config.checkpoint
            best_by = self.config.best_metric() if kept.keep_best else None
            save.save_checkpoint(self.runtime, self.ema, self.run_dir, state, kept.keep, best_by)
        self.saved = self.iteration

    def _restore(self, path: Path) -> None:
        state = load.restore(self.runtime, self.ema, path, self._note)
        self.iteration, self.elapsed = state["iteration"], state["elapsed"]
        if self.curation:
            self.curation.load(state["curation"])
        self.images, self.base_reward = state["images"], state["base_reward"]
        known = state.get("base_rewards")  # checkpoints of earlier versions lack it
        if known and len(known) == len(self.heldout):
            self.base_rewards = np.array(known, dtype=np.float32)  # None becomes NaN
        self.saved = self.iteration
        if self.config.rollout.replica:
            self.runtime.refresh(self.policy.denoiser())


def _sureness(evaluated: dict, base: np.ndarray | None) -> dict:
    """What the rewards of the base and the last evaluation are made of, and the gain with its standard error, prompt by prompt."""
    names = {"tuned_stderr": "eval/reward/stderr", "scored": "eval/scored", "failed": "eval/failed", "gain": "eval/gain",
             "gain_stderr": "eval/gain/stderr"}  # fmt: skip
    stderr = None if base is None else mean_of(base).stderr
    return ({} if stderr is None else {"base_stderr": stderr}) | {name: evaluated[key] for name, key in names.items() if key in evaluated}


def _alone(parts: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean and standard deviation of each reward, unweighted, over the pictures that it could score."""
    found = {}
    for name, values in parts.items():
        scored = values[np.isfinite(values)]
        found |= {f"reward/{name}": float(scored.mean()), f"reward/{name}/std": float(scored.std())} if len(scored) else {}
    return found
