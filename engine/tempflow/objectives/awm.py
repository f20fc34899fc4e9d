"""Advantage-weighted matching (arXiv 2509.25050): the loss of pretraining, weighted by
advantages."""

from __future__ import annotations

from tempflow.errors import check_range
from tempflow.objectives.base import Objective
from tempflow.objectives.matching import Pick, noised, picked


class Awm(Objective):
    """The loss of pretraining on the run's own finished latents, each weighted by its advantage: A
    mean |v - (eps - x0)|^2 (AWM).

    The pull of a latent is A whatever its ratio, so with several updates per rollout only a penalty
    bounds how far the policy moves.

    Args:
        draws: noise levels per latent; the sampling grid is cut into this many equal parts, and one
            level is drawn from each.
        pick: "all" latents; or "extremes", only the best and the worst of each group, which takes
            fewer forwards.
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
        # The log-likelihood of a latent is minus its matching error (see `matching`), so a constant
        # pull of A is the gradient of A times the error.
        return advantage
