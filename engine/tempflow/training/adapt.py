"""What a rollout learns from the rewards before it: which branch steps it draws, and how much noise
each step takes.

Both are options of `rollout.adapt`. Nothing is random but the draw, which follows from the run's
seed and the iteration; the rest follows from rewards that every rank has alike. So all ranks agree
without a message, and the state, a number per step, goes into the checkpoint.
"""

from __future__ import annotations

import numpy as np

from tempflow.config import Adapt as Settings
from tempflow.config import AdaptNoise
from tempflow.sampling.layout import Layout
from tempflow.sampling.plans.base import Plan
from tempflow.training.rollout import Scored
from tempflow.types import Advantages

MEMORY = 0.5  # weight of the earlier spread of a step
STREAM = 2  # of random numbers, apart from others that share the run's seed


class StepChoice:
    """Draws branch steps without replacement, each more likely the more rewards spread there.

    Args:
        count: steps that are drawn.
        steps: those to draw from, rising.
        run_seed: of the draws.
        even: share of the probability that is dealt evenly, so that no step is forgotten while it
            has no spread.
    """

    def __init__(self, count: int, steps: list[int], run_seed: int, even: float = 1 / 3):
        self.count, self.steps, self.run_seed, self.even = count, steps, run_seed, even
        self.spread: dict[int, float] = {}  # running mean; no entry: not seen yet

    def chances(self) -> np.ndarray:
        """Probability of each step, float64 [K], in proportion to its spread. One not seen yet
        counts as the step of most spread."""
        unseen = max(self.spread.values(), default=1.0)
        spread = np.array([self.spread.get(step, unseen) for step in self.steps])
        share = spread / spread.sum() if spread.any() else np.ones(len(spread)) / len(spread)
        return self.even / len(spread) + (1 - self.even) * share

    def draw(self, iteration: int) -> list[int]:
        """The steps of an iteration, rising."""
        rng = np.random.default_rng([self.run_seed, iteration, STREAM])
        return sorted(rng.choice(self.steps, self.count, replace=False, p=self.chances()).tolist())

    def update(self, spread: dict[int, float]) -> None:
        """Take up the mean standard deviation of the groups of each drawn step; NaN where none has
        a reward."""
        for step, value in spread.items():
            if np.isfinite(value):
                before = self.spread.get(step, value)
                self.spread[step] = MEMORY * before + (1 - MEMORY) * value


class NoiseLevels:
    """Factors of the noise of each step, calibrated as DenseGRPO (arXiv 2601.20218) does.

    Noise that is small against what the reward can tell makes about as many children better than
    the end of their state's own ODE as worse: then the step can bear more. Where one side prevails,
    as it does when noise spoils images, the step takes less.

    Args:
        settings: how far a level moves in an iteration, and what counts as balanced.
    """

    # beyond twice the noise, flow's step at pure noise would leave nothing of its latent
    LEAST, MOST = (0.25, 2.0)

    def __init__(self, settings: AdaptNoise):
        self.settings = settings
        self.level: dict[int, float] = {}  # no entry: 1

    def along(self, num_steps: int) -> list[float]:
        """The factor of every step of the grid."""
        return [self.level.get(step, 1.0) for step in range(num_steps)]

    def update(self, step: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        """Take up an iteration's children.

        Args:
            step: int [n], at which each took its noise.
            before, after: float64 [n], the reward of the ODE from the child's state and from the
                child; NaN where scoring failed.
        """
        better = np.sign(after - before)
        for k in np.unique(step[np.isfinite(better)]).tolist():
            balance = np.nanmean(better[step == k])
            moved = (
                self.level.get(k, 1.0)
                + (1 if abs(balance) <= self.settings.band else -1) * self.settings.step
            )
            self.level[k] = min(max(moved, self.LEAST), self.MOST)


class Adapt:
    """The controllers that a run has; without any, rollouts are what the plan and the SDE say."""

    def __init__(self, settings: Settings | None, plan: Plan):
        self._plan, steps, noise = plan, settings and settings.steps, settings and settings.noise
        self.choice = (
            StepChoice(steps, plan.branch_steps.possible(plan.num_steps), plan.run_seed)  # type: ignore[union-attr]  # config.checks refuses rollout.adapt for plans without
            if steps
            else None
        )
        self.noise = NoiseLevels(noise) if noise else None

    def plan(self, iteration: int) -> Plan:
        """The plan of an iteration."""
        return self._plan.at_steps(self.choice.draw(iteration)) if self.choice else self._plan

    @property
    def candidates(self) -> list[int] | None:
        """Steps that may be drawn, over which loss weights have mean 1: so a step's weight does not
        depend on which others were drawn with it. None: those of the rollout."""
        return self.choice.steps if self.choice else None

    @property
    def levels(self) -> list[float] | None:
        """Factors of the noise of each step; None: the SDE's own."""
        return self.noise.along(self._plan.num_steps) if self.noise else None

    def observe(self, layout: Layout, scored: Scored, credit: Advantages) -> dict[str, float]:
        """Take up an iteration; returns the metrics of what it was drawn with."""
        found: dict[str, float] = {}
        if self.choice:
            found |= {
                f"adapt/p_step_{k}": float(p)
                for k, p in zip(self.choice.steps, self.choice.chances(), strict=True)
            }
            self.choice.update(credit.spread)
        if self.noise:
            found |= {
                f"adapt/noise_{k}": self.noise.level.get(k, 1.0) for k in layout.slots.steps()
            }
            self.noise.update(layout.slots.step, *_before_and_after(layout, scored))
        return found

    def state(self) -> dict:
        """JSON values from which `load` goes on exactly."""
        return {
            "spread": _texts(self.choice.spread if self.choice else {}),
            "noise": _texts(self.noise.level if self.noise else {}),
        }

    def load(self, state: dict) -> None:
        """state: empty in a checkpoint of earlier versions, whose runs have no controllers."""
        if self.choice:
            self.choice.spread = _numbers(state["spread"])
        if self.noise:
            self.noise.level = _numbers(state["noise"])


def _before_and_after(layout: Layout, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Rewards [n] of the ODE from each child's state and from the child: values where the plan has
    them, else the trunk's and its own."""
    rewards = scored.rewards
    if rewards.before is not None and rewards.after is not None:
        return rewards.before, rewards.after
    return (
        np.where(layout.completions >= 0, scored.by_row[layout.completions], np.nan),
        rewards.total,
    )


def _texts(values: dict[int, float]) -> dict[str, float]:
    return {str(step): float(value) for step, value in values.items()}


def _numbers(values: dict[str, float]) -> dict[int, float]:
    return {int(step): value for step, value in values.items()}
