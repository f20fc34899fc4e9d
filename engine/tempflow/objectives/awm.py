"""Advantage-weighted matching (arXiv 2509.25050): the loss of pretraining, weighed by
advantages."""

from __future__ import annotations

from tempflow.errors import check_range
from tempflow.objectives.base import Objective
from tempflow.objectives.matching import Pick, noised, picked


class Awm(Objective):
    """The loss of pretraining on the run's own finished latents, each weighed by its advantage: A
    mean |v - (eps - x0)|^2 (AWM).

    The pull of a latent is A, whatever its ratio: with several updates of a rollout only a penalty
    bounds it.

    Args:
        draws: noise levels per latent, one from each of as many equal parts of the sampling grid.
        pick: "all" latents, or "extremes": the best and the worst of each group, so that fewer are
            forwarded.
    """

    wants = "endpoints"

    def __init__(self, draws: int = 4, pick: Pick = "all"):
        check_range("draws", draws, least=1, most=64)
        self.draws, self.pick = draws, pick

    def states(self, rollout, advantages):
        return noised(rollout, picked(rollout, advantages, self.pick), self.draws)

    def filler(self, rollout):
        return noised(rollout, rollout.endpoints[:1], 1)[0]

    def pull(self, advantage, log_ratio, distance):
        return advantage
