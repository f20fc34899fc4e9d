"""The training loop: roll out, score, compute advantages, update, refresh the rollout copy; and the
evaluations, checkpoints and records around it.

An iteration is a function of the config, its number, the weights, and the state that checkpoints
keep. So a resumed run repeats what an uninterrupted one would have done.
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
from tempflow.errors import counted
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
    """Rewards of the same rows after the exact suffix, in iterations that audit a coarser one."""


class Trainer:
    """Trains a session to the end, or until a signal stops it.

    Args:
        session: the parts of the run.
        recorder: writes metrics, samples, the report and the summary.
        profile: the iterations that a profiler sees.
    """

    def __init__(self, session: Session, recorder: Recorder, profile: Profile | None = None):
        self.session, self.config, self.recorder = session, session.config, recorder
        self.profile = profile or Profile(None)
        self.order = prompt_order(self.config, session.prompts)
        # This reads all condition images. Now, because a file that is missing should end the run at
        # its start and not at its first checkpoint; on rank 0, which writes checkpoints.
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
        self.seconds: dict[str, float] = {}  # by part of this iteration, on this rank
        # Iteration of the newest checkpoint. Iteration 0 counts as saved: it is the base itself.
        self.saved = 0
        self.stopped = False  # whether a signal on any rank stopped the run
        self.ended: str | None = None  # why the stop rule ended the run; None until it does

    # ------------------------------------------------------------------------------------------ run
    def run(self, resume_from: Path | None) -> dict | None:
        """Train (a collective).

        Args:
            resume_from: a whole checkpoint of this run; None: start from the base.

        Returns:
            The summary on rank 0; None on other ranks, and where a signal stopped the run.
        """
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
            # The rule's state is not in the checkpoint: it follows from the recorded metrics.
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
            # Stopped during the rollout, whose rows are discarded: resuming repeats the iteration.
            if metrics is None:
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
                    # The iteration itself was finished, so its row must not be lost.
                    self.recorder.record(metrics)
                    self._save_before(error)
                    raise
            # The row is written before the checkpoint: resuming cuts metrics.jsonl back to it.
            self._record(metrics)
            if self._due(self.config.checkpoint.every):
                self._save()
        self.profile.before(self.iteration)
        self._save_new()
        self.stopped = bool(distributed.reduce(self.session.stop(), "max"))
        self._say_why_it_ended()

    def _say_why_it_ended(self) -> None:
        """Tell the user why the run ended early, if it did."""
        if self.stopped:
            why = getattr(self.session.stop, "received", None) or "a signal on another rank"
            self.recorder.note(
                f"stopped by {why} after iteration {self.iteration}; continue with --resume"
            )
        elif self.ended:
            self.recorder.note(
                f"stopped after iteration {self.iteration} by {self.ended}; to continue, use"
                " --resume with another eval.stop"
            )

    def _save_before(self, error: TooManyFailed) -> None:
        """Write a checkpoint before an error ends the run, if the rewards failed."""
        # If the model failed its weights are broken, and a new checkpoint could remove a good one.
        if not error.model_broken:
            self._save_new()

    def _done(self) -> bool:
        """Whether the run is over: by the last iteration, the time limit, the stop rule, or a
        signal on any rank (a collective)."""
        t = self.config.training
        over = self.iteration >= t.iterations or (
            t.minutes is not None and self.elapsed >= 60 * t.minutes
        )
        # Clocks and signals differ between ranks, and one that left the loop alone would leave the
        # others in a collective.
        return bool(
            distributed.reduce(over or self.ended is not None or self.session.stop(), "max")
        )

    def _due(self, every: int) -> bool:
        """Whether something that happens every so many iterations is due now."""
        # Not at the last iteration, after which the run evaluates and saves in any case.
        return (
            every > 0
            and self.iteration % every == 0
            and self.iteration < self.config.training.iterations
        )

    def _record(self, metrics: dict) -> None:
        """Write a row of metrics, and apply the stop rule to it if it has an evaluation."""
        self.recorder.record(metrics)
        if self.rule and self.evaluator.evaluated_at == self.iteration:
            # Only rank 0 has the evaluation's metrics; its verdict holds for all.
            self.ended = distributed.agree_on(
                self.rule.observe(metrics) if distributed.rank() == 0 else None
            )

    # ------------------------------------------------------------------------------------ iteration
    def _iterate(self) -> dict | None:
        """One iteration; returns its metrics, or None if a stop was requested in the rollout."""
        self.seconds = {}
        drawn, layout = self._draw()
        rollout = self._roll_out(layout)  # the reward workers score images meanwhile
        if rollout is None:
            return None
        # Every rank computes all advantages from all rewards, so none needs to be sent.
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
        """The iteration's prompts, drawn by curation if there is any, and the rows of all units."""
        drawn = self.curation.draw(self.iteration) if self.curation else None
        indices = drawn.indices if drawn else self.order.indices(self.iteration)
        return drawn, plan_iteration(
            self.session, indices, self.iteration, self.adapt.plan(self.iteration)
        )

    def _roll_out(self, layout: Layout) -> Rolled | None:
        """Roll out and score, in iterations that audit a coarser suffix also with the exact one.
        None if a stop was requested."""
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
            # The same layout and noise: only the steps after the last noise differ.
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
        """Show curation the rewards of the prompts that it drew; returns its metrics."""
        if drawn is None or self.curation is None:
            return {}
        self.curation.update(drawn, self.iteration, layout.slots, rollout.scored.rewards.total)
        return self.curation.metrics(drawn, self.iteration)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Time a part of the iteration."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def _times(self) -> dict[str, float]:
        """Seconds of the iteration's parts, each on the rank where it took longest."""
        # All ranks have the same keys in the same order, because they ran the same parts.
        longest = distributed.reduce(list(self.seconds.values()), "max")
        return {
            f"time/{name}": float(value) for name, value in zip(self.seconds, longest, strict=True)
        }

    def _refresh(self) -> None:
        """Write the trained weights into the rollout copy, if there is one (a collective)."""
        if self.config.rollout.replica:
            self.session.runtime.refresh(self.session.policy.denoiser())

    def _progress(self) -> float:
        """The progress of the run, in [0, 1]: by iterations, or by the time limit if that is nearer
        (a collective)."""
        t = self.config.training
        timed = self.elapsed / (60 * t.minutes) if t.minutes else 0.0
        # One clock for all ranks: the learning rate must be the same everywhere.
        return min(1.0, max(self.iteration / t.iterations, float(distributed.reduce(timed, "max"))))

    def _lr_factor(self) -> float:
        """A cosine from 1 to training.lr_decay over the run; constant where that is 1."""
        floor = self.config.training.lr_decay
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self._progress()))

    # ------------------------------------------------------------------------------------------ end
    def _finish(self) -> dict | None:
        """The last evaluation, the summary and the report; returns the summary on rank 0."""
        known = self.evaluator.evaluated_at == self.iteration  # stopped right after an evaluation
        final = self.evaluator.metrics if known else self.evaluator.evaluate(self.iteration)
        if distributed.rank() != 0:
            return None
        if final and not known:
            self.recorder.merge_into_last_row(self.iteration, final)
        average = self.session.average
        if average and not average.taken:
            self.recorder.note(
                f"training.{average.key}: no average was taken in"
                f" {counted(average.updates, 'update')} (training.{average.key}.every:"
                f" {average.every}), so evaluations and exports use the raw weights; lower"
                f" training.{average.key}.every to get an average"
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
        """Write a checkpoint of this iteration (a collective)."""
        s = self.session
        # Everything that lives across iterations: what is missing here, a resumed run would lose.
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
        """Write a checkpoint, unless this iteration has one."""
        if self.saved != self.iteration:
            self._save()

    def _restore(self, path: Path) -> None:
        """Return the run to a checkpoint (a collective)."""
        s = self.session
        state = load.restore(s.runtime, s.average, path, self.recorder.note)
        self.iteration, self.elapsed, self.images = (
            state["iteration"],
            state["elapsed"],
            state["images"],
        )
        if self.curation:
            self.curation.load(state["curation"])
        self.adapt.load(state.get("adapt", {}))  # checkpoints of earlier versions lack it
        self.evaluator.load(state)
        self.saved = self.iteration
        # The rollout copy still has the weights of the base.
        self._refresh()
