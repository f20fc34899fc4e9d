"""Loss weights of the steps of a grid: profiles that set the size of each step's gradient.

Without a weight, the gradient of a step with respect to the velocity has the size |b| / tau under
the plain ratio of likelihoods (d log p / dv = b eps / tau), and |b| under the normalized ratio of
GRPO-Guard, which is tau times as large. The weight of a step is the size in its profile divided by
that size, and weights are scaled to mean 1 over the trained steps:

    profile    size            plain ratio    guard ratio    source
    uniform    unweighted      1              1              Flow-GRPO, arXiv 2505.05470
    noise      |b|             tau            1              TempFlow-GRPO, arXiv 2508.04324
    guard      |b| / |dt|      tau / |dt|     1 / |dt|       GRPO-Guard, arXiv 2510.22319
    value      |b| f           tau f          f              VGPO, arXiv 2512.12387

Here f_k = 1 + gamma + ... + gamma^(K - k - 1) with K stochastic steps: the discounted sum, over the
remaining steps, of a reward that is the same in expectation at each of them.
"""

from __future__ import annotations

import torch

from tempflow.sampling.steps import Grid

PROFILES = {  # value of `training.weighting`: what it does
    '"noise"': (
        "Scale the gradient of each step to |b|, by a weight proportional to the noise scale tau"
        " (TempFlow-GRPO, arXiv 2508.04324)."
    ),
    '"uniform"': (
        "Leave the gradient of the ratio of likelihoods as it is (Flow-GRPO, arXiv 2505.05470)."
    ),
    '"guard"': (
        "Scale the gradient of each step to |b| / |dt|, about the same for all steps (GRPO-Guard,"
        " arXiv 2510.22319)."
    ),
    '{"value": gamma}': (
        "Like noise, times the discounted number of remaining steps (VGPO, arXiv 2512.12387)."
    ),
}


def step_weights(
    grid: Grid, steps: list[int], weighting: str, ratio: str = "plain", gamma: float = 1.0
) -> torch.Tensor:
    """The loss weight of every step, fp32 [T]: mean 1 over the trained steps, 0 elsewhere.

    Args:
        grid: T steps, the last of which takes no noise.
        steps: the trained steps.
        weighting: "uniform", "noise", "guard" or "value".
        ratio: the objective's ratio, "plain" or "guard".
        gamma: discount of "value", above 0 and at most 1.
    """
    tau = grid.sde.tau
    weights = torch.zeros_like(tau)
    if weighting == "uniform":
        weights[steps] = 1.0
        return weights
    # |b| cancels: it is in the gradient without a weight and in the size of every other profile.
    sizes = tau if ratio == "plain" else torch.ones_like(tau)
    if weighting == "guard":
        sizes = sizes / torch.diff(grid.sigmas).abs()
    if weighting == "value":
        sizes = sizes * _falling(len(tau) - 1, gamma)
    # Mean 1, so that another profile or a subset of steps does not change the learning rate.
    weights[steps] = sizes[steps] / sizes[steps].mean()
    return weights


def _falling(number: int, gamma: float) -> torch.Tensor:
    """f_k of K = `number` stochastic steps, and 0 for the last step: fp32 [K + 1]."""
    # A sum, since the closed form (1 - gamma^(K - k)) / (1 - gamma) is 0 / 0 for gamma 1.
    sums = torch.cumsum(gamma ** torch.arange(number, dtype=torch.float64), 0)
    return torch.cat([sums.flip(0), torch.zeros(1, dtype=torch.float64)]).float()
