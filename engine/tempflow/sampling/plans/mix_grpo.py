"""The plan of MixGRPO (arXiv 2507.21802): rows that take noise in a window of steps, which moves
along the grid."""

from __future__ import annotations

from tempflow.errors import UserError, check_range
from tempflow.sampling.plans.base import Plan, check_seeds, path
from tempflow.types import Row, Unit


class MixGrpo(Plan):
    """One row for each seed, which takes noise in a window of steps that moves along the grid
    during the run.

    Args:
        seeds: rows per prompt, whose rewards are compared.
        window: stochastic steps per iteration.
        every: iterations after which the window moves on by one step.
        values: also reward the completion of every state by the ODE, which costs one more row for
            each state. The advantages dense, stepwise and turning_point need it.
    """

    def __init__(self, seeds: int = 4, window: int = 4, every: int = 25, values: bool = False):
        check_range("window", window, least=1)
        check_range("every", every, least=1, below=2**31)
        self.seeds, self.window, self.every, self.values = check_seeds(seeds), window, every, values

    def prepare(self, num_steps: int, run_seed: int) -> None:
        super().prepare(num_steps, run_seed)
        if self.window > num_steps - 1:
            raise UserError(
                f"window: {self.window}; num_steps {num_steps} has at most {num_steps - 1} steps"
                " that can take noise"
            )

    def steps(self, iteration: int) -> list[int]:
        # After its last place the window starts again at the first step.
        first = iteration // self.every % (self.num_steps - self.window)
        return list(range(first, first + self.window))

    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        return path(unit, self.steps(iteration), self.values)
