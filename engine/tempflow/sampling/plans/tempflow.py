"""The plan of TempFlow-GRPO (arXiv 2508.04324): a deterministic trunk for each seed, and children
that branch off it."""

from __future__ import annotations

from tempflow.errors import UserError, check_range, shown
from tempflow.sampling.plans.base import BranchSteps, Plan, check_seeds
from tempflow.types import Row, Unit


class TempFlow(Plan):
    """A trunk without noise for each seed, and children that leave it at each branch step by one
    noisy step and then follow the ODE.

    Args:
        seeds: S, initial noises per prompt.
        children: B, children per (seed, branch step), 1 to 64; or a list with one number for each
            branch step, if branch_steps is "all" or a list.
        branch_steps: steps that take noise: "all" but the last, a list, or {"random": n} for n
            steps that are drawn in each iteration, spread over the grid.
    """

    branch_steps: BranchSteps

    def __init__(
        self, seeds: int = 4, children: int | list = 6, branch_steps: str | list | dict = "all"
    ):
        self.seeds, self.branch_steps, self._given = (
            check_seeds(seeds),
            BranchSteps(branch_steps),
            _checked(children),
        )
        self.children = max(children) if isinstance(children, list) else children
        if isinstance(children, list) and self.branch_steps.random:
            raise UserError(
                'children: a list needs branch_steps "all" or a list of as many steps, but'
                ' branch_steps is {"random": n}'
            )

    def prepare(self, num_steps: int, run_seed: int) -> None:
        super().prepare(num_steps, run_seed)
        self.branch_steps.check(num_steps)
        # Checked here and not in the constructor, because "all" depends on the grid.
        steps = self.branch_steps.possible(num_steps)
        counts = self._given if isinstance(self._given, list) else [self._given] * len(steps)
        if len(counts) != len(steps):
            raise UserError(
                f"children: {len(counts)} numbers for {len(steps)} branch steps; expected one for"
                " each"
            )
        self._counts = dict(zip(steps, counts))

    def steps(self, iteration: int) -> list[int]:
        return self.branch_steps.at(iteration, self.num_steps, self.run_seed)

    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        steps = self.steps(iteration)
        # path: the number of a child among its siblings of one step, which names its noise.
        children = [
            Row(unit, k, frozenset([k]), parent=0, path=(i,))
            for k in steps
            for i in range(self._counts[k])
        ]
        return [Row(unit), *children]


def _checked(children: int | list) -> int | list:
    """The option; UserError if it is neither a number of children nor a list of such numbers."""
    numbers = children if isinstance(children, list) else [children]
    if not numbers or any(type(number) is not int for number in numbers):
        raise UserError(
            f"children: expected a whole number or a list of whole numbers, got {shown(children)}"
        )
    for number in numbers:
        check_range("children", number, least=1, most=64)
    return children
