"""Preference objectives: a loss of all children of a state together, by the order or the size of
their advantages.

Log-ratios are means over the latent's elements and of size 1e-3, so `beta` is of size 100 where it
is 0.1 in the papers, whose log-ratios are sums. Like every objective's, the gradient is a mean over
the children.
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
        beta: scale of the log-ratios; larger ones end a pair's pull sooner.
    """

    def __init__(self, beta: float = 100.0):
        check_range("beta", beta, above=0)
        self.beta = beta

    def group_pull(self, advantage, log_ratio, valid):
        best = advantage.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
        worst = advantage.masked_fill(~valid, torch.inf).argmin(1, keepdim=True)
        u = self.beta * (log_ratio.gather(1, best) - log_ratio.gather(1, worst))
        pull = torch.where(
            advantage.gather(1, best) > advantage.gather(1, worst),
            self.beta * torch.sigmoid(-u),
            0.0,
        )
        return (
            pull.new_zeros(advantage.shape).scatter_add(1, best, pull).scatter_add(1, worst, -pull)
        )


class Dmpo(GroupObjective):
    """Matches the policy's distribution over a state's children to the one that their advantages
    ask for, and stops there (DMPO).

    L = KL(q | p) with q = softmax(beta log ratio) and p = softmax(A / temperature). At a ratio of 1
    the pull is proportional to A, as the policy gradient's. Derived from the reverse KL of arXiv
    2507.07510, whose exact loss was not available.

    Args:
        beta: scale of the log-ratios.
        temperature: of the advantages; smaller ones ask for more of the best child.
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
        weight, gap = q.exp(), torch.where(valid, q - p, 0.0)
        return -self.beta * weight * (gap - (weight * gap).sum(1, keepdim=True))


class Dgpo(GroupObjective):
    """Direct group preference optimization: one preference of a state's better children over its
    worse ones (DGPO).

    L = -log sigmoid(beta sum of A log ratio over the children) (arXiv 2510.08425), here on the
    children of a step.

    Args:
        beta: scale of the log-ratios; larger ones end a group's pull sooner.
    """

    def __init__(self, beta: float = 100.0):
        check_range("beta", beta, above=0)
        self.beta = beta

    def group_pull(self, advantage, log_ratio, valid):
        preferred = torch.where(valid, advantage * log_ratio, 0.0).sum(1, keepdim=True)
        return self.beta * torch.sigmoid(-self.beta * preferred) * advantage
