"""A plan of your own: its branch steps move from the start of the sampling grid to the end during
the run."""

from tempflow.errors import UserError
from tempflow.sampling.plans.base import Plan
from tempflow.types import Row, Unit


class LateBranches(Plan):
    """A trunk for each seed, and children at a few neighboring steps, which move on by one every
    few iterations.

    Args:
        seeds: trunks per prompt.
        children: children that branch off each trunk at each branch step.
        size: number of branch steps.
        every: iterations after which the branch steps move on by one.
    """

    def __init__(self, seeds: int = 2, children: int = 4, size: int = 3, every: int = 10):
        self.seeds, self.children, self.size, self.every = seeds, children, size, every

    def prepare(self, num_steps: int, run_seed: int) -> None:
        super().prepare(num_steps, run_seed)
        if self.size > num_steps - 1:
            raise UserError(f"size: {self.size}; there are only {num_steps - 1} steps to branch at")

    def steps(self, iteration: int) -> list[int]:
        # The last step ends at sigma 0, where no noise is taken.
        first = min(iteration // self.every, self.num_steps - 1 - self.size)
        return list(range(first, first + self.size))

    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        trunk = Row(unit)
        # parent: the trunk's place in this list. path: names the child's noise, so siblings need
        # different paths.
        return [trunk] + [
            Row(unit, k, frozenset([k]), parent=0, path=(i,))
            for k in self.steps(iteration)
            for i in range(self.children)
        ]
