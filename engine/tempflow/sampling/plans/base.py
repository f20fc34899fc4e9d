"""The base class of plans, which make the rows of each unit (prompt, seed) and choose the steps at
which rows take noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy

import numpy as np

from tempflow.errors import UserError, check_range, shown
from tempflow.types import Row, Unit


class Plan(ABC):
    """Decides which latents an iteration integrates.

    The constructor takes the options and checks each by itself; `prepare` checks them against the
    sampling grid. The rows must be a function of the options, the run's seed, the unit and the
    iteration, because every rank computes them, and a resumed run computes them again.
    """

    seeds: int
    """Initial noises per prompt."""
    children: int = 1
    """The largest number of rows that branch off one state; 1 for a plan that does not branch."""
    branch_steps: BranchSteps | None = None
    """The steps that take noise, if `at_steps` can narrow them; else None."""
    num_steps: int
    """Steps of the sampling grid; set by `prepare`."""
    run_seed: int
    """Seed of the run's random choices; set by `prepare`."""

    def prepare(self, num_steps: int, run_seed: int) -> None:
        """Set the values of the run, before any other method is called.

        Args:
            num_steps: steps of the sampling grid.
            run_seed: seed of the run's random choices.

        Raises:
            UserError: an option does not fit the grid. The message begins with the option.
        """
        self.num_steps, self.run_seed = num_steps, run_seed

    @abstractmethod
    def steps(self, iteration: int) -> list[int]:
        """The stochastic steps of an iteration, in rising order. The last step of the grid,
        `num_steps - 1`, takes no noise."""

    @abstractmethod
    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        """The rows of a unit, parents before their children."""

    def at_steps(self, steps: list[int]) -> Plan:
        """A copy of this prepared plan that takes noise at the given steps in every iteration.

        Args:
            steps: some of the steps that this plan may take noise at.

        Raises:
            UserError: the plan has no `branch_steps`.
            ValueError: `steps` is empty or holds others.
        """
        if self.branch_steps is None:
            raise UserError(f"{type(self).__name__} does not allow its steps to be chosen")
        unknown = set(steps) - set(self.branch_steps.possible(self.num_steps))
        if unknown or not steps:
            raise ValueError(
                f"steps {sorted(steps)} of {self.branch_steps.possible(self.num_steps)}"
            )
        narrowed = copy(self)  # shallow: what `prepare` has set stays
        narrowed.branch_steps = BranchSteps(sorted(steps))
        return narrowed


def path(unit: Unit, steps: list[int], values: bool) -> list[Row]:
    """One row with noise at some steps. With `values`, also a row for each of these steps that
    completes its state by the ODE, so that its reward is the state's value."""
    completions = [Row(unit, k, parent=0, value=True) for k in steps] if values else []
    return [Row(unit, noise=frozenset(steps)), *completions]


def check_seeds(seeds: int) -> int:
    """The number of seeds; UserError if it is out of range."""
    check_range("seeds", seeds, least=1, below=2**31)
    return seeds


class BranchSteps:
    """The steps that an option like `branch_steps` stands for.

    Args:
        given: "all" for all steps but the last, a rising list of steps, or {"random": n} for n
            steps that are drawn for each iteration.
        option: its name, for errors.
    """

    def __init__(self, given: str | list | dict, option: str = "branch_steps"):
        self.option = option
        # `type(...) is int`, because true is an int to isinstance, and a config may hold it.
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
        """Raise a UserError for steps outside a grid of `num_steps` steps."""
        last = num_steps - 2
        if self.listed and self.listed[-1] > last:
            raise UserError(
                f"{self.option}: step {shown(self.listed[-1])} is outside the grid; allowed are 0"
                f" to {last} (num_steps {num_steps}, the last step takes no noise)"
            )
        if self.random and self.random > last + 1:
            raise UserError(
                f"{self.option}.random: {shown(self.random)}; num_steps {num_steps} has at most"
                f" {last + 1} steps that can take noise"
            )

    def possible(self, num_steps: int) -> list[int]:
        """All steps that an iteration may take noise at, in rising order."""
        return self.listed or list(range(num_steps - 1))

    def at(self, iteration: int, num_steps: int, run_seed: int) -> list[int]:
        """The steps of an iteration, in rising order. Random steps are drawn one from each of n
        equal parts of the grid, so that they spread over it."""
        steps = self.possible(num_steps)
        if not self.random:
            return steps
        # A new generator for each iteration, so that a resumed run draws the same steps.
        rng = np.random.default_rng([run_seed, iteration])
        return [
            int(rng.choice(stratum)) for stratum in np.array_split(np.array(steps), self.random)
        ]
