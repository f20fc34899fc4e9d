"""The protocol of plans: the rows of a (prompt, seed), and the steps at which they take noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy

import numpy as np

from tempflow.errors import UserError, check_range, shown
from tempflow.types import Row, Unit


class Plan(ABC):
    """Which latents an iteration integrates.

    The constructor takes the options and checks each by itself; `prepare` checks them against the
    sampling grid. Everything that a plan does is a function of its options, the run's seed, the
    unit and the iteration, so every rank and every resumed run finds the same rows.
    """

    seeds: int
    """Initial noises per prompt."""
    children: int = 1
    """Rows that branch off one state, at most; 1 for a plan that does not branch."""
    branch_steps: BranchSteps | None = None
    """The steps that take noise, of a plan that `at_steps` can narrow."""
    num_steps: int
    """Steps of the sampling grid."""
    run_seed: int
    """Of the run's random choices."""

    def prepare(self, num_steps: int, run_seed: int) -> None:
        """Set what the run decides. Raises UserError, which begins with the option, for one that
        does not fit the grid."""
        self.num_steps, self.run_seed = num_steps, run_seed

    @abstractmethod
    def steps(self, iteration: int) -> list[int]:
        """The stochastic steps of an iteration, rising; at most `num_steps - 2`, since the last
        step takes no noise."""

    @abstractmethod
    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        """The rows of a unit, parents before their children."""

    def at_steps(self, steps: list[int]) -> Plan:
        """This plan, prepared, with noise at some of its possible steps alone, whatever the
        iteration; all else stays as it is.

        Raises UserError for a plan without `branch_steps`, and ValueError for steps that are not
        its own.
        """
        if self.branch_steps is None:
            raise UserError(f"{type(self).__name__} does not let its steps be chosen")
        unknown = set(steps) - set(self.branch_steps.possible(self.num_steps))
        if unknown or not steps:
            raise ValueError(
                f"steps {sorted(steps)} of {self.branch_steps.possible(self.num_steps)}"
            )
        narrowed = copy(self)
        narrowed.branch_steps = BranchSteps(sorted(steps))
        return narrowed


def path(unit: Unit, steps: list[int], values: bool) -> list[Row]:
    """A row with noise at some steps and, with `values`, rows that complete its states there by the
    ODE."""
    completions = [Row(unit, k, parent=0, value=True) for k in steps] if values else []
    return [Row(unit, noise=frozenset(steps)), *completions]


def check_seeds(seeds: int) -> int:
    """UserError for a number of seeds that no run has."""
    check_range("seeds", seeds, least=1, below=2**31)
    return seeds


class BranchSteps:
    """The steps that an option like `branch_steps` means: "all" but the last, a list of them, or
    {"random": n}."""

    def __init__(self, given: str | list | dict, option: str = "branch_steps"):
        self.option = option
        listed = isinstance(given, list) and all(type(step) is int and step >= 0 for step in given)
        self.random = (
            given["random"] if isinstance(given, dict) and set(given) == {"random"} else None
        )
        if not (given == "all" or listed or type(self.random) is int and self.random >= 1):
            allowed = 'expected "all", a list of steps from 0 on, or {"random": n} with n from 1 on'
            raise UserError(f"{option}: {allowed}, got {shown(given)}")
        if listed and (not given or sorted(set(given)) != given):
            raise UserError(f"{option}: expected rising steps without repeats, got {shown(given)}")
        self.listed: list[int] | None = given if isinstance(given, list) and listed else None

    def check(self, num_steps: int) -> None:
        """UserError for steps that the grid does not have."""
        last = num_steps - 2
        if self.listed and self.listed[-1] > last:
            raise UserError(
                f"{self.option}: step {shown(self.listed[-1])} is outside the grid; allowed are 0"
                f" to {last} (num_steps {num_steps}, the last step takes no noise)"
            )
        if self.random and self.random > last + 1:
            raise UserError(f"{self.option}.random: {shown(self.random)} of {last + 1} steps")

    def possible(self, num_steps: int) -> list[int]:
        """The steps that an iteration may have, rising."""
        return self.listed or list(range(num_steps - 1))

    def at(self, iteration: int, num_steps: int, run_seed: int) -> list[int]:
        """The steps of an iteration; of random ones, one in each of n equal parts of the grid."""
        steps = self.possible(num_steps)
        if not self.random:
            return steps
        rng = np.random.default_rng([run_seed, iteration])
        return [
            int(rng.choice(stratum)) for stratum in np.array_split(np.array(steps), self.random)
        ]
