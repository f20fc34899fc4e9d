"""The plan of TempFlow-GRPO: one deterministic trunk a seed, and children that branch off it."""

from __future__ import annotations

from tempflow.errors import check_range
from tempflow.sampling.plans.base import BranchSteps, Plan, check_seeds
from tempflow.types import Row, Unit


class TempFlow(Plan):
    """A trunk without noise for each seed, and children that leave it at each branch step by one noisy step.

    Args:
        seeds: S, initial noises per prompt.
        children: B, children per (seed, branch step); at most 64.
        branch_steps: steps that take noise: "all" but the last, a list, or {"random": n} for n drawn anew each iteration, spread
            over the grid.
    """

    def __init__(self, seeds: int = 4, children: int = 6, branch_steps: str | list | dict = "all"):
        check_range("children", children, least=1, most=64)
        self.seeds, self.children, self.branch_steps = check_seeds(seeds), children, BranchSteps(branch_steps)

    def prepare(self, num_steps: int, run_seed: int) -> None:
        super().prepare(num_steps, run_seed)
        self.branch_steps.check(num_steps)

    def steps(self, iteration: int) -> list[int]:
        return self.branch_steps.at(iteration, self.num_steps, self.run_seed)

    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        steps = self.steps(iteration)
        children = [Row(unit, k, frozenset([k]), parent=0, path=(i,)) for k in steps for i in range(self.children)]
        return [Row(unit), *children]
