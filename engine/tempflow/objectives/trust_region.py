"""Policy-gradient objectives that keep an update near the old policy by other means than clipping
the ratio."""

from __future__ import annotations

import torch

from tempflow.errors import check_range
from tempflow.objectives.base import Objective


class Dppo(Objective):
    """The policy gradient without a clip, stopped where the KL divergence of a step from the old
    policy's is too large (Flow-DPPO).

    L = -A ratio (arXiv 2606.11025). A child has no gradient if its state's divergence exceeds
    `delta` and its ratio has already moved in the direction of A. The divergence is exact, and one
    number for all children of a state.

    Args:
        delta: largest KL divergence of a step from the old policy's, as a mean over the latent's
            elements.
    """

    keeps_velocity = True
    stops_children = True

    def __init__(self, delta: float = 1e-5):
        check_range("delta", delta, above=0)
        self.delta = delta

    def pull(self, advantage, log_ratio, distance):
        # Children that have moved against A keep their gradient: it leads back to the old policy.
        stopped = (distance > self.delta) & (advantage * log_ratio > 0)
        # d ratio / d log ratio is the ratio itself, hence the exp.
        return torch.where(stopped, 0.0, advantage * torch.exp(log_ratio))


class Hinge(Objective):
    """A hinge on the log-ratio: the pull is constant until the log-ratio has moved by `xi` in the
    direction of the advantage, then 0.

    L = max(0, xi |A| - A log ratio), as in PCPO (arXiv 2509.25774) and RSM (arXiv 2604.17415).

    Args:
        xi: the log-ratio at which the pull of a child ends.
    """

    stops_children = True

    def __init__(self, xi: float = 1e-3):
        check_range("xi", xi, above=0)
        self.xi = self.clip_low = self.clip_high = xi

    def pull(self, advantage, log_ratio, distance):
        # Inside of the hinge L is linear in the log-ratio, with slope -A.
        return torch.where(advantage * log_ratio < self.xi * advantage.abs(), advantage, 0.0)


class Spo(Objective):
    """A quadratic penalty on the ratio in place of a clip: the pull is 0 at a distance of `epsilon`
    from 1 and points back beyond it (SPO).

    L = -(A ratio - |A| (ratio - 1)^2 / (2 epsilon)) (arXiv 2401.16025). Metrics count ratios beyond
    1 +- epsilon as clipped.

    Args:
        epsilon: distance of the ratio from 1 at which the loss is least.
        asymmetric: use the penalty only where A < 0, and a clip where A > 0 (ASPO of arXiv
            2602.02481).
    """

    def __init__(self, epsilon: float = 1e-3, asymmetric: bool = False):
        check_range("epsilon", epsilon, above=0, below=1)
        self.epsilon = self.clip_low = self.clip_high = epsilon
        self.asymmetric = asymmetric

    def pull(self, advantage, log_ratio, distance):
        ratio = torch.exp(log_ratio)
        # d ratio / d log ratio is the ratio itself, hence the factor.
        pull = ratio * (advantage - advantage.abs() * (ratio - 1) / self.epsilon)
        if not self.asymmetric:
            return pull
        return torch.where(
            advantage > 0, torch.where(ratio > 1 + self.epsilon, 0.0, advantage * ratio), pull
        )
