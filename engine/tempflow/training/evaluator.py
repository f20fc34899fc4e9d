"""Evaluations during a run, by all ranks together, of the averaged weights if there are any."""

from __future__ import annotations

import time
from contextlib import contextmanager

import numpy as np

from tempflow.run import evaluation
from tempflow.run.drift import Looks
from tempflow.run.failures import check_failed
from tempflow.run.means import mean_of
from tempflow.run.metrics import DRIFT
from tempflow.run.recorder import Recorder
from tempflow.training import distributed
from tempflow.training.session import Session


class Evaluator:
    """Evaluates a session on its held-out prompts. It keeps the rewards and looks of the base, from
    which gain and drift are measured.

    Attributes:
        metrics: of the newest evaluation, on rank 0.
        evaluated_at: the iteration of the newest evaluation; -1 before the first.
    """

    def __init__(self, session: Session, recorder: Recorder):
        self.session, self.recorder = session, recorder
        self.base_reward: float | None = None
        # Of each held-out prompt, [n]: gains are measured prompt by prompt, which has a smaller
        # standard error than a difference of means.
        self.base_rewards: np.ndarray | None = None
        self.base_looks: Looks | None = None
        self.metrics: dict = {}
        self.evaluated_at = -1

    @contextmanager
    def _averaged_weights(self):
        """Put the average into the rollout copy if one was taken; yields the name of the weights
        that are evaluated."""
        # Without a copy the average would have to overwrite the weights that are trained.
        s = self.session
        if s.average is None or not s.config.rollout.replica or not s.average.taken:
            yield "raw"
            return
        s.runtime.refresh(s.policy.denoiser(), s.average.gather)
        try:
            yield s.average.key
        # The next rollout needs the trained weights, also after an error.
        finally:
            s.runtime.refresh(s.policy.denoiser())

    def evaluate(self, iteration: int) -> dict:
        """Sample and score the held-out prompts (a collective).

        Args:
            iteration: number of finished iterations; 0 is the base, whose results are kept.

        Returns:
            The metrics on rank 0; an empty dict elsewhere, or without prompts.

        Raises:
            TooManyFailed: more images than `reward_pool.max_failed` allows have no reward.
        """
        s, e = self.session, self.session.config.eval
        if not s.heldout or e.every == 0:
            return {}
        mine = list(range(len(s.heldout)))[distributed.rank() :: distributed.world_size()]
        started = time.perf_counter()
        with (
            self._averaged_weights() as weights,
            self.recorder.console.phase("eval", len(mine)) as advance,
            s.threads.shared(),
        ):
            drawn = evaluation.draw(s, s.heldout, mine, advance=advance)
            scored = evaluation.evaluate(s.pool, s.specs, s.heldout, drawn, e.keep_samples)
        images, failed, not_finite = map(int, distributed.reduce(scored.counts()))
        check_failed(
            f"the evaluation at iteration {iteration}",
            images,
            failed,
            not_finite,
            s.config.reward_pool.max_failed,
            distributed.first_of_any(s.pool.last_error),
        )
        self.evaluated_at = iteration
        gathered = distributed.gather_objects(scored)
        if gathered is None:
            return {}
        scored = evaluation.merge(gathered)
        facts = {
            "iteration": iteration,
            "num_steps": s.eval_steps(),
            "seed": evaluation.EVAL_SEED,
            "weights": weights,
        }
        self.recorder.samples(scored, s.heldout, facts)
        if iteration == 0:
            self.base_looks = scored.looks
        found = evaluation.metrics(scored, self.base_rewards, self.base_looks, e.precision_recall)
        self.metrics = found | {"time/eval": time.perf_counter() - started}
        if iteration == 0:
            self.base_reward, self.base_rewards = self.metrics["eval/reward"], scored.reward
        return self.metrics

    def state(self) -> dict:
        """JSON values from which `load` restores the evaluator."""
        # JSON has no NaN: a prompt without a reward is null.
        known = (
            None
            if self.base_rewards is None
            else [None if np.isnan(x) else float(x) for x in self.base_rewards]
        )
        looks = self.base_looks.pack() if self.base_looks else None
        return {"base_reward": self.base_reward, "base_rewards": known, "base_looks": looks}

    def load(self, state: dict) -> None:
        """Restore the evaluator from `state`."""
        self.base_reward = state["base_reward"]
        # Checkpoints of earlier versions lack it, and with eval.prompts changed it does not fit.
        known = state.get("base_rewards")
        if known and len(known) == len(self.session.heldout):
            self.base_rewards = np.array(known, dtype=np.float32)  # None becomes NaN
        if looks := state.get("base_looks"):
            self.base_looks = Looks.unpack(looks)

    def sureness(self, final: dict) -> dict:
        """For the summary: standard errors and counts of the base's and the last evaluation's
        rewards, the gain with its standard error, and the drift.

        Args:
            final: the metrics of the last evaluation.
        """
        names = {
            "tuned_stderr": "eval/reward/stderr",
            "scored": "eval/scored",
            "failed": "eval/failed",
            "gain": "eval/gain",
            "gain_stderr": "eval/gain/stderr",
        }
        stderr = None if self.base_rewards is None else mean_of(self.base_rewards).stderr
        known = {name: final[key] for name, key in names.items() if key in final} | {
            key: final[key] for key in DRIFT if key in final
        }
        return ({} if stderr is None else {"base_stderr": stderr}) | known
