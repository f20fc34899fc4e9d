"""The plan of objectives that learn from finished latents: samples of the ODE without noise."""

from __future__ import annotations

from tempflow.sampling.plans.base import Plan, check_seeds
from tempflow.types import Row, Unit


class Samples(Plan):
    """One row for each seed, which follows the ODE from its initial noise.

    There are no states to train on, so the objective must be one that learns from finished latents,
    such as nft.

    Args:
        seeds: rows per prompt, whose rewards are compared.
    """

    def __init__(self, seeds: int = 4):
        self.seeds = check_seeds(seeds)

    def steps(self, iteration: int) -> list[int]:
        return []  # the ODE alone

    def rows(self, unit: Unit, iteration: int) -> list[Row]:
        return [Row(unit)]
