"""Preference objectives: losses of all children of a state together, which depend on the order or
the size of their advantages.

Log-ratios are means over the latent's elements here, of order 1e-3; in the papers they are sums. So
`beta` is of order 100 where the papers have 0.1. As for every objective, the gradient is a mean
over the children.
"""

from __future__ import annotations

import torch

from tempflow.errors import check_range
from tempflow.objectives.base import GroupObjective


class Dpo(GroupObjective):
    """Direct preference optimization on the best and the worst child of every state, against the
    old policy.

    L = -log sigmoid(u), u = beta (log ratio of the best - log ratio of the worst) (Diffusion-DPO,
    arXiv 2311.12908).

    Args:
        beta: factor of the log-ratios; with a larger one the pull of a pair ends sooner.
    """

    def __init__(self, beta: float = 100.0):
        check_range("beta", beta, above=0)
        self.beta = beta

    def group_pull(self, advantage, log_ratio, valid):
        # Infinities keep masked children from being chosen; the first of equal ones is.
        best = advantage.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
        worst = advantage.masked_fill(~valid, torch.inf).argmin(1, keepdim=True)
        u = self.beta * (log_ratio.gather(1, best) - log_ratio.gather(1, worst))
        # -dL/du = sigmoid(-u); u rises by beta with the log-ratio of the best child, and falls by
        # beta with that of the worst. With equal advantages, or one valid child, there is no pair.
        pull = torch.where(
            advantage.gather(1, best) > advantage.gather(1, worst),
            self.beta * torch.sigmoid(-u),
            0.0,
        )
        return (
            pull.new_zeros(advantage.shape).scatter_add(1, best, pull).scatter_add(1, worst, -pull)
        )


class Dmpo(GroupObjective):
    """Matches the policy's distribution over a state's children to a target distribution given by
    their advantages, and stops there (DMPO).

    L = KL(q | p) with q = softmax(beta log ratio) and p = softmax(A / temperature). At a ratio of 1
    the pull is proportional to A, like that of the policy gradient. The loss is derived from the
    reverse KL of arXiv 2507.07510, whose exact form was not available.

    Args:
        beta: factor of the log-ratios.
        temperature: divisor of the advantages; with a smaller one the target prefers the best child
            more strongly.
    """

    def __init__(self, beta: float = 100.0, temperature: float = 1.0):
        check_range("beta", beta, above=0)
        check_range("temperature", temperature, above=0)
        self.beta, self.temperature = beta, temperature

    def group_pull(self, advantage, log_ratio, valid):
        q, p = (
            torch.log_softmax(logits.masked_fill(~valid, -torch.inf), 1)
            for logits in (self.beta * log_ratio, advantage / self.temperature)
        )
        # dL / d(beta log ratio) = q (log q - log p - L): the last sum is L itself. log_softmax of a
        # masked child is -inf in both, and -inf - (-inf) would be NaN.
        weight, gap = q.exp(), torch.where(valid, q - p, 0.0)
        return -self.beta * weight * (gap - (weight * gap).sum(1, keepdim=True))


class Dgpo(GroupObjective):
    """Direct group preference optimization: one preference of all better children of a state over
    all worse ones (DGPO).

    L = -log sigmoid(beta sum of A log ratio over the children) (arXiv 2510.08425), here on the
    children of a step.

    Args:
        beta: factor of the log-ratios; with a larger one the pull of a group ends sooner.
    """

    def __init__(self, beta: float = 100.0):
        check_range("beta", beta, above=0)
        self.beta = beta

    def group_pull(self, advantage, log_ratio, valid):
        # One factor for the group: how far it is from preferring its better children.
        preferred = torch.where(valid, advantage * log_ratio, 0.0).sum(1, keepdim=True)
        return self.beta * torch.sigmoid(-self.beta * preferred) * advantage
