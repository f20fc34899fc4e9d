"""Loss weights of the steps of a grid: profiles that say how large the trained gradient of each
step shall be.

By itself the gradient of a step in the velocity has the size |b| / tau under the plain ratio of
likelihoods (d log p / dv = b eps / tau), and |b| under the normalized ratio of GRPO-Guard, which is
tau times as large. A step's weight is the size that its profile asks for over that, and the weights
of the trained steps have mean 1:

    profile    size            plain ratio    guard ratio    source
    uniform    as by itself    1              1              Flow-GRPO, arXiv 2505.05470
    noise      |b|             tau            1              TempFlow-GRPO, arXiv 2508.04324
    guard      |b| / |dt|      tau / |dt|     1 / |dt|       GRPO-Guard, arXiv 2510.22319
    value      |b| f           tau f          f              VGPO, arXiv 2512.12387

With f_k = 1 + gamma + ... + gamma^(K - k - 1) of K stochastic steps: the discounted sum over the
rest of the steps of a reward that each of them expects alike.
"""

from __future__ import annotations

import torch

from tempflow.sampling.steps import Grid

PROFILES = {  # value of `training.weighting`: what it does
    '"noise"': (
        "The gradient of each step as large as its noise scale asks for, |b| (TempFlow-GRPO, arXiv"
        " 2508.04324)."
    ),
    '"uniform"': (
        "The gradient as the ratio of likelihoods leaves it (Flow-GRPO, arXiv 2505.05470)."
    ),
    '"guard"': (
        "The gradient as large as |b| / |dt|, about the same for all steps (GRPO-Guard, arXiv"
        " 2510.22319)."
    ),
    '{"value": gamma}': (
        "As noise, times the discounted number of steps left (VGPO, arXiv 2512.12387)."
    ),
}


def step_weights(
    grid: Grid, steps: list[int], weighting: str, ratio: str = "plain", gamma: float = 1.0
) -> torch.Tensor:
    """Loss weight of every step, fp32 [T]: of mean 1 over the trained steps, 0 elsewhere.

    Args:
        grid: T steps, the last of which takes no noise.
        steps: those that are trained.
        weighting: "uniform", "noise", "guard" or "value".
        ratio: of the objective, "plain" or "guard".
        gamma: of "value", above 0, at most 1.
    """
    tau = grid.sde.tau
    weights = torch.zeros_like(tau)
    if weighting == "uniform":
        weights[steps] = 1.0
        return weights
    sizes = tau if ratio == "plain" else torch.ones_like(tau)
    if weighting == "guard":
        sizes = sizes / torch.diff(grid.sigmas).abs()
    if weighting == "value":
        sizes = sizes * _falling(len(tau) - 1, gamma)
    weights[steps] = sizes[steps] / sizes[steps].mean()
    return weights


def _falling(number: int, gamma: float) -> torch.Tensor:
    """(1 - gamma^(K - k)) / (1 - gamma) of K = `number` steps, and 0 at the last one; fp32 [K +
    1]."""
    sums = torch.cumsum(gamma ** torch.arange(number, dtype=torch.float64), 0)
    return torch.cat([sums.flip(0), torch.zeros(1, dtype=torch.float64)]).float()
