"""The training loop: roll out, score, give credit, update, refresh; and around it evaluations,
checkpoints, records.

Everything an iteration depends on is a function of the config, the iteration's number and the
weights, so a resumed run repeats what an undisturbed one would have done.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from tempflow.checkpoints import load, save
from tempflow.data.curation import Curation, Draw
from tempflow.data.prompts import digests
from tempflow.profiling import Profile, span
from tempflow.rewards import kinds_of
from tempflow.run.console import Console
from tempflow.run.environment import device_name, versions
from tempflow.run.failures import TooManyFailed
from tempflow.run.recorder import Recorder
from tempflow.run.stopping import StopRule
from tempflow.sampling.layout import Layout
from tempflow.training import distributed
from tempflow.training.adapt import Adapt
from tempflow.training.credit import make_parts, reward_metrics, suffix_metrics, update_metrics
from tempflow.training.evaluator import Evaluator
from tempflow.training.passes import Passes
from tempflow.training.rollout import (
    RolledOut,
    Scored,
    count_rows,
    gather_rewards,
    plan_iteration,
    roll_out,
)
from tempflow.training.session import Session, check_rewards
from tempflow.training.shares import prompt_order
from tempflow.types import Advantages


@dataclass(frozen=True)
class Rolled:
    """An iteration that was rolled out and scored."""

    rolled: RolledOut
    scored: Scored
    exact: Scored | None
    """Of the same rows with the exact suffix, where a coarser one is audited."""


class Trainer:
    """Trains a session to the end, or to a signal. Where it stands is what its checkpoints keep."""

    def __init__(self, session: Session, recorder: Recorder, profile: Profile | None = None):
        self.session, self.config, self.recorder = session, session.config, recorder
        self.profile = profile or Profile(None)
        self.order = prompt_order(self.config, session.prompts)
        # Reads all condition images, now rather than when a checkpoint waits for it, and on the
        # rank that writes it.
        self.prompts = digests(session.prompts, session.heldout) if distributed.rank() == 0 else {}
        choice = self.config.data.curation
        self.curation = (
            Curation(choice, self.order, session.advantage.over, kinds_of(session.fitting))
            if choice
            else None
        )
        self.adapt = Adapt(self.config.rollout.adapt, session.plan)
        self.passes = Passes(session, recorder, self._save_new)
        self.evaluator = Evaluator(session, recorder)
        self.rule = StopRule(self.config.eval.stop) if self.config.eval.stop else None
        self.iteration, self.elapsed, self.images = 0, 0.0, 0
        self.seconds: dict[str, float] = {}  # of the parts of this iteration, on this rank
        # iteration of the newest checkpoint; before the first update there is nothing to save
        self.saved = 0
        self.stopped = False  # by a signal on any rank
        self.ended: str | None = None  # why the stop rule ended the run

    # ------------------------------------------------------------------------------------------ run
    def run(self, resume_from: Path | None) -> dict | None:
        """Train; returns the summary on rank 0. resume_from: a whole checkpoint of this run."""
        s, t = self.session, self.config.training
        check_rewards(s)
        if resume_from:
            self._restore(resume_from)
        self.recorder.begin(
            self.iteration if resume_from else -1,
            Console(
                t.iterations,
                distributed.rank() == 0,
                start=self.iteration,
                base_reward=self.evaluator.base_reward,
                minutes=t.minutes,
                elapsed=self.elapsed,
                watched=[spec.name for spec in s.specs if spec.watched],
            ),
        )
        with self.recorder.console:
            if resume_from and self.rule:
                self.ended = distributed.agree_on(
                    self.rule.replay(self.recorder.rows(), self.config.eval.every)
                )
            self._train(first=resume_from is None)
            summary = None if self.stopped else self._finish()
        self.recorder.close()
        if summary:
            self.recorder.console.summary(summary, self.recorder.run_dir)
        return summary

    def _train(self, first: bool) -> None:
        if first:
            self._record({"iteration": 0, **self.evaluator.evaluate(0)})
        while not self._done():
            started = time.perf_counter()
            self.profile.before(self.iteration)
            try:
                with span("iteration", number=self.iteration):
                    metrics = self._iterate()
            except TooManyFailed as error:
                self._save_before(error)
                raise
            if metrics is None:  # stopped during the rollout, which is given up
                break
            self.iteration += 1
            spent = time.perf_counter() - started
            self.elapsed += spent
            metrics |= {
                "iteration": self.iteration,
                "time/total": spent,
                "time/elapsed": self.elapsed,
            }
            if self._due(self.config.eval.every):
                try:
                    metrics |= self.evaluator.evaluate(self.iteration)
                except TooManyFailed as error:
                    self.recorder.record(metrics)
                    self._save_before(error)
                    raise
            self._record(metrics)
            if self._due(self.config.checkpoint.every):
                self._save()
        self.profile.before(self.iteration)
        self._save_new()
        self.stopped = bool(distributed.reduce(self.session.stop(), "max"))
        self._say_why_it_ended()

    def _say_why_it_ended(self) -> None:
        if self.stopped:
            why = getattr(self.session.stop, "received", None) or "a signal on another rank"
            self.recorder.note(
                f"stopped by {why} after iteration {self.iteration}; continue with --resume"
            )
        elif self.ended:
            self.recorder.note(
                f"stopped after iteration {self.iteration} by {self.ended}; to go on: --resume with"
                " another eval.stop"
            )

    def _save_before(self, error: TooManyFailed) -> None:
        """Keep the work so far where the rewards failed; where the model did, the checkpoints
        before stay as they are."""
        if not error.model_broken:
            self._save_new()

    def _done(self) -> bool:
        """All ranks together: the last iteration, the time limit, the stopping rule, or a
        signal."""
        t = self.config.training
        over = self.iteration >= t.iterations or (
            t.minutes is not None and self.elapsed >= 60 * t.minutes
        )
        return bool(
            distributed.reduce(over or self.ended is not None or self.session.stop(), "max")
        )

    def _due(self, every: int) -> bool:
        return (
            every > 0
            and self.iteration % every == 0
            and self.iteration < self.config.training.iterations
        )

    def _record(self, metrics: dict) -> None:
        """Write a row, and let the stopping rule see it where it was evaluated, with one verdict on
        every rank."""
        self.recorder.record(metrics)
        if self.rule and self.evaluator.evaluated_at == self.iteration:
            self.ended = distributed.agree_on(
                self.rule.observe(metrics) if distributed.rank() == 0 else None
            )

    # ------------------------------------------------------------------------------------ iteration
    def _iterate(self) -> dict | None:
        """One iteration; None where a stop was asked for during the rollout."""
        self.seconds = {}
        drawn, layout = self._draw()
        rollout = self._roll_out(layout)  # the reward workers score images meanwhile
        if rollout is None:
            return None
        credit = self.session.advantage(layout.slots, rollout.scored.rewards)
        with self._timed("train"):
            parts = make_parts(self.session, rollout.rolled, credit, self.adapt.candidates)
            updates, forwards = self.passes.take(parts, self.iteration, self._lr_factor)
        with self._timed("sync"), span("weight sync"):
            self._refresh()
        metrics = self._metrics(rollout, credit, updates, forwards) | self._curate(
            drawn, layout, rollout
        )
        return metrics | self.adapt.observe(layout, rollout.scored, credit) | self._times()

    def _draw(self) -> tuple[Draw | None, Layout]:
        """The iteration's prompts, as curation drew them where there is any, and the rows of all
        units."""
        drawn = self.curation.draw(self.iteration) if self.curation else None
        indices = drawn.indices if drawn else self.order.indices(self.iteration)
        return drawn, plan_iteration(
            self.session, indices, self.iteration, self.adapt.plan(self.iteration)
        )

    def _roll_out(self, layout: Layout) -> Rolled | None:
        """Roll out and score; with the exact suffix once more, where a coarser one is audited. None
        where a stop was asked for."""
        s, suffix = self.session, self.config.rollout.suffix
        audits = (
            suffix is not None
            and suffix.audit_every > 0
            and self.iteration % suffix.audit_every == 0
        )
        rows = count_rows(s, layout, suffix) + (count_rows(s, layout, None) if audits else 0)
        with self.recorder.console.phase("rollout", rows) as advance, s.threads.shared():
            rolled = roll_out(s, layout, self.iteration, suffix, advance, self.adapt.levels)
            if rolled is None:
                return None
            scored = gather_rewards(s, rolled)
            self.seconds |= rolled.seconds | scored.seconds
            with self._timed("audit"):
                again = (
                    roll_out(s, layout, self.iteration, None, advance, self.adapt.levels)
                    if audits
                    else None
                )
                if audits and again is None:
                    return None
                return Rolled(rolled, scored, gather_rewards(s, again) if again else None)

    def _metrics(
        self, rollout: Rolled, credit: Advantages, updates: list[dict], forwards: int
    ) -> dict:
        self.images += rollout.scored.images
        return (
            reward_metrics(rollout.scored, credit, rollout.rolled)
            | {"images/total": self.images}
            | suffix_metrics(self.session, rollout.scored, credit, rollout.rolled, rollout.exact)
            | update_metrics(updates, forwards, self.session.runtime.learning_rate())
        )

    def _curate(self, drawn: Draw | None, layout: Layout, rollout: Rolled) -> dict:
        """Let curation see the rewards of the prompts that it drew; its metrics."""
        if drawn is None or self.curation is None:
            return {}
        self.curation.update(drawn, self.iteration, layout.slots, rollout.scored.rewards.total)
        return self.curation.metrics(drawn, self.iteration)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Note what a part of the iteration takes."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def _times(self) -> dict[str, float]:
        """Seconds of the iteration's parts, on the rank that each took longest on."""
        longest = distributed.reduce(list(self.seconds.values()), "max")
        return {
            f"time/{name}": float(value) for name, value in zip(self.seconds, longest, strict=True)
        }

    def _refresh(self) -> None:
        """Bring the trained weights into the rollout copy."""
        if self.config.rollout.replica:
            self.session.runtime.refresh(self.session.policy.denoiser())

    def _progress(self) -> float:
        """How far the run is, in [0, 1]: by iterations, or by the time limit where that is
        nearer."""
        t = self.config.training
        timed = self.elapsed / (60 * t.minutes) if t.minutes else 0.0
        return min(1.0, max(self.iteration / t.iterations, float(distributed.reduce(timed, "max"))))

    def _lr_factor(self) -> float:
        floor = self.config.training.lr_decay
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self._progress()))

    # ------------------------------------------------------------------------------------------ end
    def _finish(self) -> dict | None:
        """The last evaluation, the summary and the report."""
        known = self.evaluator.evaluated_at == self.iteration  # stopped right after an evaluation
        final = self.evaluator.metrics if known else self.evaluator.evaluate(self.iteration)
        if distributed.rank() != 0:
            return None
        if final and not known:
            self.recorder.merge_into_last_row(self.iteration, final)
        average = self.session.average
        if average and not average.taken:
            self.recorder.note(
                f"training.{average.key}: no average was taken in {average.updates} updates"
                f" (training.{average.key}.every: {average.every}); the raw weights were evaluated,"
                " and are what will be exported"
            )
        summary = {
            "base_reward": self.evaluator.base_reward,
            "tuned_reward": final.get("eval/reward"),
            **self.evaluator.sureness(final),
            "minutes": self.elapsed / 60,
            "iterations": self.iteration,
            "images": self.images,
            "model": self.config.model.path,
            "plan": self.config.rollout.plan["type"],
            "device": device_name(),
            "world_size": distributed.world_size(),
            "versions": versions(),
            "stopped": self.ended,
        }
        self.recorder.finish(summary)
        return summary

    # ---------------------------------------------------------------------------------- checkpoints
    def _save(self) -> None:
        s = self.session
        state = {
            "iteration": self.iteration,
            "elapsed": self.elapsed,
            "images": self.images,
            **self.evaluator.state(),
            "curation": self.curation.state() if self.curation else None,
            "adapt": self.adapt.state(),
            **({f"{s.average.key}_updates": s.average.updates} if s.average else {}),
            "world_size": distributed.world_size(),
            "config": self.config.model_dump(),
            "prompts": self.prompts,
            "versions": versions(),
        }
        with self.recorder.console.phase("checkpoint"), span("checkpoint"):
            kept = self.config.checkpoint
            best_by = self.config.best_metric() if kept.keep_best else None
            save.save_checkpoint(
                s.runtime, s.average, self.recorder.run_dir, state, kept.keep, best_by
            )
        self.saved = self.iteration

    def _save_new(self) -> None:
        """A checkpoint, unless this iteration has one."""
        if self.saved != self.iteration:
            self._save()

    def _restore(self, path: Path) -> None:
        s = self.session
        state = load.restore(s.runtime, s.average, path, self.recorder.note)
        self.iteration, self.elapsed, self.images = (
            state["iteration"],
            state["elapsed"],
            state["images"],
        )
        if self.curation:
            self.curation.load(state["curation"])
        self.adapt.load(state.get("adapt", {}))
        self.evaluator.load(state)
        self.saved = self.iteration
        self._refresh()
