"""A plan of your own: branch steps that move from the start of the grid to its end in the course of
the run."""

from tempflow.errors import UserError
from tempflow.sampling.plans.base import Plan
from tempflow.types import Row, Unit


class LateBranches(Plan):
    """A trunk for each seed, and children at a few neighboring steps, which move on by one every
    few iterations.

    Args:
        seeds: trunks per prompt.
        children: rows that branch off each of them at each step.
        size: steps that are branched at.
        every: iterations after which the steps move on by one.
    """

    def __init__(self, seeds: int = 2, children: int = 4, size: int = 3, every: int = 10):
        self.seeds, self.children, self.size, self.every = seeds, children, size, every

    def prepare(self, num_steps: int, run_seed: int) -> None:
        super().prepare(num_steps, run_seed)
        if self.size > num_steps - 1:
            raise UserError(f"size: {self.size} of {num_steps - 1} steps")

    def steps(self, iteration: int) -> list[int]:
        first = min(iteration // self.every, self.num_steps - 1 - self.size)
        return list(range(first, first + self.size))

    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        trunk = Row(unit)
        # parent: the trunk's place in the list. path: what names a child's noise among its
        # siblings'.
        return [trunk] + [
            Row(unit, k, frozenset([k]), parent=0, path=(i,))
            for k in self.steps(iteration)
            for i in range(self.children)
        ]
