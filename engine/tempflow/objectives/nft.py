"""DiffusionNFT (arXiv 2509.16117): learns from finished latents that are noised again, without a
ratio of likelihoods."""

from __future__ import annotations

import torch

from tempflow.errors import check_range
from tempflow.objectives.base import Objective, kernel_loss
from tempflow.objectives.matching import noised

# Smallest divisor of `_error`: a prediction that is exact would divide 0 by 0.
LEAST_ERROR = 1e-5


class Nft(Objective):
    """Pulls the velocity towards finished latents of high reward and away from those of low reward
    (DiffusionNFT).

    A latent x0 is noised to x = (1 - s) x0 + s eps. Let v_old be the velocity before the updates,
    v+ = beta v + (1 - beta) v_old, and v- = (1 + beta) v_old - beta v. The loss is max_advantage
    (r E(v+) + (1 - r) E(v-)) / beta. E is the squared error of the predicted x0 over its mean
    absolute error, and r = A / (2 max_advantage) + 1/2, clipped to [0, 1].

    Args:
        beta: how far v+ and v- lie from the old velocity.
        max_advantage: advantages are clipped to +- this.
        draws: noise levels per latent; the sampling grid is cut into this many equal parts, and one
            level is drawn from each.
    """

    wants = "endpoints"
    keeps_velocity = True

    def __init__(self, beta: float = 1.0, max_advantage: float = 5.0, draws: int = 4):
        check_range("beta", beta, above=0)
        check_range("max_advantage", max_advantage, above=0)
        check_range("draws", draws, least=1, most=64)
        self.beta, self.max_advantage, self.draws = beta, max_advantage, draws

    def states(self, rollout, advantages):
        return noised(rollout, rollout.endpoints, self.draws)

    def loss(self, velocity, batch, old, penalty, velocity_ref):
        v, before = velocity.float(), velocity.detach() if old is None else old.velocity
        # A state made of an endpoint has one child: its target eps - x0.
        before, target = before.float(), batch.children[:, 0]
        r = (batch.advantage[:, 0] / (2 * self.max_advantage) + 0.5).clamp(0, 1)
        above = _error(self.beta * v + (1 - self.beta) * before, target, batch.sigma)
        below = _error((1 + self.beta) * before - self.beta * v, target, batch.sigma)
        rows = self.max_advantage * (r * above + (1 - r) * below) / self.beta
        # Selected, because padding may hold anything and 0 * NaN is NaN.
        loss = torch.where(batch.weight != 0, batch.weight * rows, 0.0).mean()
        # With advantages of 0 the kernel adds the penalty and measures ratios, for the metrics.
        none = torch.zeros_like(batch.advantage)
        held, seen = kernel_loss(
            velocity,
            batch,
            none,
            old,
            penalty,
            velocity_ref,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        return loss + held, seen


def _error(velocity: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Squared error of the predicted x0 = x - sigma v over its mean absolute error, which is taken
    as constant; fp32 [N]."""
    # x cancels in the difference of the two predictions of x0.
    apart = (sigma.reshape(-1, *[1] * (velocity.ndim - 1)) * (target - velocity)).flatten(1)
    return apart.square().mean(1) / apart.detach().abs().mean(1).clamp(min=LEAST_ERROR)
