"""The tree of BranchGRPO (arXiv 2509.06040): noise everywhere, and rows that split at some
steps."""

from __future__ import annotations

from tempflow.errors import check_range
from tempflow.sampling.plans.base import BranchSteps, Plan, check_seeds
from tempflow.types import Row, Unit


class Tree(Plan):
    """A tree for each seed: every row takes noise at every step, and splits into `width` at each of
    `split_steps`.

    What a row is worth at a step is the mean reward of the leaves below it. With the advantage over
    "seed" all nodes of a tree at one depth are compared, as the paper does.

    Args:
        seeds: trees per prompt.
        width: rows that each row becomes at a split.
        split_steps: where rows split; the default has width^3 leaves.
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
            for parent in range(len(rows)):
                for branch in range(1, self.width):
                    # Rising numbers along a path keep it apart from every other, also where a row
                    # splits several times.
                    path = (*rows[parent].path, split * self.width + branch)
                    rows.append(Row(unit, step, later, parent, path))
        return rows
