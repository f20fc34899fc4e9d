"""The plan of Flow-GRPO (arXiv 2505.05470): rows without branches that take noise at every step."""

from __future__ import annotations

from tempflow.sampling.plans.base import BranchSteps, Plan, check_seeds, path
from tempflow.types import Row, Unit


class FlowGrpo(Plan):
    """One row for each seed, which takes noise at every step but the last.

    Args:
        seeds: rows per prompt, whose rewards are compared.
        branch_steps: steps that take noise: "all" but the last, a list, or {"random": n} for n
            steps that are drawn in each iteration, spread over the grid.
        values: also reward the completion of every state by the ODE, which costs one more row for
            each state. The advantages dense, stepwise and turning_point need it.
    """

    branch_steps: BranchSteps

    def __init__(
        self, seeds: int = 4, branch_steps: str | list | dict = "all", values: bool = False
    ):
        self.seeds, self.branch_steps = check_seeds(seeds), BranchSteps(branch_steps)
        self.values = values

    def prepare(self, num_steps: int, run_seed: int) -> None:
        super().prepare(num_steps, run_seed)
        self.branch_steps.check(num_steps)

    def steps(self, iteration: int) -> list[int]:
        return self.branch_steps.at(iteration, self.num_steps, self.run_seed)

    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        return path(unit, self.steps(iteration), self.values)
