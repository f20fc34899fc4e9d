"""States made of finished latents, for objectives that match velocities instead of steps.

A finished latent x0 is noised again to x = (1 - s) x0 + s eps. Its likelihood under the velocity v
at x is defined as exp(-kappa mean |v - (eps - x0)|^2). Up to a constant, that is the density of one
child y = eps - x0 under N(v, 1 / (2 kappa)): a step with a = 0, b = 1 and tau = (2 kappa)^-1/2. So
log-ratios, kernels and penalties of steps are used unchanged.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from tempflow.objectives.base import Rollout
from tempflow.sampling.noise import AFTERWARDS
from tempflow.types import Advantages, Endpoint, State

Form = Literal["v", "eps"]
Pick = Literal["all", "extremes"]


def noised(
    rollout: Rollout, endpoints: list[Endpoint], draws: int, form: Form = "v", kappa: float = 1.0
) -> list[State]:
    """States at `draws` noise levels of each latent. The sampling grid is cut into as many equal
    parts, and one level is drawn from each.

    Args:
        rollout: gives the grid and the noise.
        endpoints: finished latents of this rank.
        draws: noise levels per latent; fewer where the grid has fewer steps.
        form: "v" matches the velocity. "eps" matches the noise, x + (1 - s) v to eps, whose error
            is (1 - s)^2 times that of v; s = 1, where it is 0, is left out.
        kappa: factor of the error in the log-likelihood.
    """
    # The last sigma is 0, at which there is no noise and no forward.
    levels = np.arange(len(rollout.grid.sigmas) - 1)
    if form == "eps":
        levels = levels[rollout.grid.sigmas[:-1].cpu().numpy() < 1]
    # One level from each part, so that every latent is seen at high and at low noise.
    strata = np.array_split(levels, min(draws, len(levels)))
    return [
        _state(rollout, endpoint, draw, steps, form, kappa)
        for endpoint in endpoints
        for draw, steps in enumerate(strata)
    ]


def _state(
    rollout: Rollout, endpoint: Endpoint, draw: int, steps: np.ndarray, form: Form, kappa: float
) -> State:
    # The level and eps follow from the key, so they do not depend on the rank that draws them.
    key = rollout.noise.key(endpoint.unit, AFTERWARDS - draw, (endpoint.slot,))
    step = int(np.random.default_rng(abs(key)).choice(steps))
    sigma = rollout.grid.sigmas[step].item()
    eps = rollout.noise.sample([key], endpoint.latent.shape, endpoint.latent.device)[0]
    x = (1 - sigma) * endpoint.latent + sigma * eps
    # (a, b, child) of N(a x + b v, tau^2): v against eps - x0, or x + (1 - s) v against eps.
    a, b, child = (0.0, 1.0, eps - endpoint.latent) if form == "v" else (1.0, 1 - sigma, eps)
    return State(
        endpoint.unit,
        step,
        sigma,
        a,
        b,
        (2 * kappa) ** -0.5,
        x,
        child[None],
        np.array([endpoint.slot]),
    )


def picked(rollout: Rollout, advantages: Advantages, pick: Pick) -> list[Endpoint]:
    """This rank's finished latents: all of them, or the best and the worst of every group. Of equal
    ones the first is taken."""
    if pick == "all":
        return rollout.endpoints
    # Over the slots of all ranks, which are the same everywhere: a group may span several ranks.
    labels, chosen = rollout.slots.groups(rollout.over), set()
    for label in np.unique(labels[advantages.valid]):
        members = np.flatnonzero((labels == label) & advantages.valid)
        values = advantages.values[members]
        chosen |= {int(members[values.argmax()]), int(members[values.argmin()])}
    return [endpoint for endpoint in rollout.endpoints if endpoint.slot in chosen]
