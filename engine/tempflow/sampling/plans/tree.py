"""The plan of BranchGRPO (arXiv 2509.06040): rows that take noise at every step and split at some
steps."""

from __future__ import annotations

from tempflow.errors import check_range
from tempflow.sampling.plans.base import BranchSteps, Plan, check_seeds
from tempflow.types import Row, Unit


class Tree(Plan):
    """A tree for each seed: every row takes noise at every step, and splits into `width` rows at
    each of `split_steps`.

    The reward of a row at a step is the mean reward of the leaves below it. With the advantage over
    "seed" all nodes of a tree at the same depth are compared, as in the paper.

    Args:
        seeds: trees per prompt.
        width: rows that each row becomes at a split, 2 to 64.
        split_steps: steps at which rows split, like branch_steps of tempflow; the default gives
            width^3 leaves.
    """

    def __init__(
        self,
        seeds: int = 1,
        width: int = 2,
        split_steps: list = [0, 3, 6],  # noqa: B006 (read, never changed)
    ):
        check_range("width", width, least=2, most=64)
        self.seeds, self.width, self.splits = (
            check_seeds(seeds),
            width,
            BranchSteps(split_steps, "split_steps"),
        )

    def prepare(self, num_steps: int, run_seed: int) -> None:
        super().prepare(num_steps, run_seed)
        self.splits.check(num_steps)

    def steps(self, iteration: int) -> list[int]:
        return list(range(self.num_steps - 1))

    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        rows = [Row(unit, noise=frozenset(self.steps(iteration)))]
        for split, step in enumerate(self.splits.at(iteration, self.num_steps, self.run_seed)):
            later = frozenset(range(step, self.num_steps - 1))
            # The length is read before the loop adds rows: these split at the next step only.
            for parent in range(len(rows)):
                for branch in range(1, self.width):
                    # Numbers that rise along a path make it unique, even if a row splits several
                    # times. They begin at 1: the row that continues has the noise of branch 0.
                    path = (*rows[parent].path, split * self.width + branch)
                    rows.append(Row(unit, step, later, parent, path))
        return rows
