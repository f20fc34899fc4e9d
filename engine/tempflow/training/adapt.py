"""Adapts rollouts to earlier rewards: which branch steps are drawn, and how much noise each step
takes.

Both are options of `rollout.adapt`. Only the draw is random, and it follows from the run's seed and
the iteration; everything else follows from rewards that are the same on every rank. So all ranks
agree without communication. The state is a number per step and goes into the checkpoint.
"""

from __future__ import annotations

import numpy as np

from tempflow.config import Adapt as Settings
from tempflow.config import AdaptNoise
from tempflow.sampling.layout import Layout
from tempflow.sampling.plans.base import Plan
from tempflow.training.rollout import Scored
from tempflow.types import Advantages

MEMORY = 0.5  # weight of the earlier iterations in the running mean of a step's spread
STREAM = 2  # keeps these random numbers apart from other draws with the run's seed


class StepChoice:
    """Draws branch steps without replacement. A step is the likelier, the more its rewards differ
    within groups.

    Args:
        count: number of steps to draw.
        steps: the steps to draw from, in ascending order.
        run_seed: seed of the draws.
        even: share of the probability that all steps have in equal parts, so that a step without
            spread is still drawn now and then.
    """

    def __init__(self, count: int, steps: list[int], run_seed: int, even: float = 1 / 3):
        self.count, self.steps, self.run_seed, self.even = count, steps, run_seed, even
        self.spread: dict[int, float] = {}  # running mean by step; no entry: never drawn

    def chances(self) -> np.ndarray:
        """Probability of each step, float64 [K], in proportion to its spread."""
        # A step that was never drawn counts as the one of largest spread, so it is tried soon.
        unseen = max(self.spread.values(), default=1.0)
        spread = np.array([self.spread.get(step, unseen) for step in self.steps])
        share = spread / spread.sum() if spread.any() else np.ones(len(spread)) / len(spread)
        return self.even / len(spread) + (1 - self.even) * share

    def draw(self, iteration: int) -> list[int]:
        """The steps of an iteration, in ascending order."""
        rng = np.random.default_rng([self.run_seed, iteration, STREAM])
        return sorted(rng.choice(self.steps, self.count, replace=False, p=self.chances()).tolist())

    def update(self, spread: dict[int, float]) -> None:
        """Observe an iteration.

        Args:
            spread: for each drawn step, the mean standard deviation of its groups; NaN where no
                group has a reward.
        """
        for step, value in spread.items():
            if np.isfinite(value):
                before = self.spread.get(step, value)
                self.spread[step] = MEMORY * before + (1 - MEMORY) * value


class NoiseLevels:
    """Factors of the noise of each step, calibrated as in DenseGRPO (arXiv 2601.20218).

    While the noise of a step is small, about as many children are better as are worse than the ODE
    from the same state. The step then gets more noise. When one side prevails, as it does when the
    noise spoils images, the step gets less.

    Args:
        settings: how far a level moves in an iteration, and which balance counts as even.
    """

    # With more than twice the noise, the step of `flow` at pure noise would keep nothing of its
    # latent.
    LEAST, MOST = (0.25, 2.0)

    def __init__(self, settings: AdaptNoise):
        self.settings = settings
        self.level: dict[int, float] = {}  # by step; no entry: 1

    def along(self, num_steps: int) -> list[float]:
        """The factor of every step of the grid, [T]."""
        return [self.level.get(step, 1.0) for step in range(num_steps)]

    def update(self, step: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        """Observe an iteration's children.

        Args:
            step: int [n], the step at which each child took its noise.
            before: float64 [n], the reward of the ODE from the child's state; NaN where scoring
                failed.
            after: float64 [n], the reward of the ODE from the child; NaN where scoring failed.
        """
        # Signs and not differences: the balance then does not depend on the scale of the reward.
        better = np.sign(after - before)
        for k in np.unique(step[np.isfinite(better)]).tolist():
            balance = np.nanmean(better[step == k])
            moved = (
                self.level.get(k, 1.0)
                + (1 if abs(balance) <= self.settings.band else -1) * self.settings.step
            )
            self.level[k] = min(max(moved, self.LEAST), self.MOST)


class Adapt:
    """The controllers of a run. Without any, rollouts follow the plan and the SDE unchanged.

    Args:
        settings: the `rollout.adapt` section; None: no controllers.
        plan: the run's plan.
    """

    def __init__(self, settings: Settings | None, plan: Plan):
        self._plan, steps, noise = plan, settings and settings.steps, settings and settings.noise
        self.choice = None
        if steps:
            # config.checks refuses rollout.adapt.steps for plans without.
            assert plan.branch_steps is not None
            possible = plan.branch_steps.possible(plan.num_steps)
            self.choice = StepChoice(steps, possible, plan.run_seed)
        self.noise = NoiseLevels(noise) if noise else None

    def plan(self, iteration: int) -> Plan:
        """The plan of an iteration."""
        return self._plan.at_steps(self.choice.draw(iteration)) if self.choice else self._plan

    @property
    def candidates(self) -> list[int] | None:
        """The steps that may be drawn, over which loss weights have mean 1. None: those of the
        rollout."""
        # Over all of them, so that a step's weight does not depend on which others were drawn.
        return self.choice.steps if self.choice else None

    @property
    def levels(self) -> list[float] | None:
        """Factors of the noise of every step, [T]; None: the SDE's own noise."""
        return self.noise.along(self._plan.num_steps) if self.noise else None

    def observe(self, layout: Layout, scored: Scored, credit: Advantages) -> dict[str, float]:
        """Observe an iteration; returns the metrics of the probabilities and levels that it had."""
        # Metrics first: `update` changes what they report.
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
        """JSON values from which `load` restores the controllers exactly."""
        return {
            "spread": _texts(self.choice.spread if self.choice else {}),
            "noise": _texts(self.noise.level if self.noise else {}),
        }

    def load(self, state: dict) -> None:
        """Restore the controllers from `state`."""
        # Checkpoints of earlier versions have an empty state; their runs have no controllers.
        if self.choice:
            self.choice.spread = _numbers(state["spread"])
        if self.noise:
            self.noise.level = _numbers(state["noise"])


def _before_and_after(layout: Layout, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Rewards, float64 [n] each, of the ODE from each child's state and from the child."""
    # A plan with values has completed every state. Otherwise a child's state lies on its trunk,
    # whose reward is that of the ODE from there; -1 marks slots without one.
    rewards = scored.rewards
    if rewards.before is not None and rewards.after is not None:
        return rewards.before, rewards.after
    return (
        np.where(layout.completions >= 0, scored.by_row[layout.completions], np.nan),
        rewards.total,
    )


def _texts(values: dict[int, float]) -> dict[str, float]:
    # Keys of JSON objects are texts.
    return {str(step): float(value) for step, value in values.items()}


def _numbers(values: dict[str, float]) -> dict[int, float]:
    return {int(step): value for step, value in values.items()}
