"""States made of finished latents, for objectives that match velocities instead of steps.

A finished latent x0 is noised anew to x = (1 - s) x0 + s eps. The likelihood exp(-kappa mean |v -
(eps - x0)|^2) of the velocity there is that of one child, up to a constant: y = eps - x0 under N(v,
1 / (2 kappa)). So log-ratios, kernels and penalties are a step's.
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
    """The states of `draws` noise levels of each latent, one from each of as many equal parts of
    the sampling grid.

    Args:
        rollout: whose grid and noise are drawn from.
        endpoints: of this rank.
        draws: at most; fewer where the grid has fewer steps.
        form: "v" matches the velocity; "eps" the noise, x + (1 - s) v to eps, which is (1 - s)^2
            times the error in v and so leaves out s = 1.
        kappa: of the likelihood.
    """
    levels = np.arange(len(rollout.grid.sigmas) - 1)
    if form == "eps":
        levels = levels[rollout.grid.sigmas[:-1].cpu().numpy() < 1]
    strata = np.array_split(levels, min(draws, len(levels)))
    return [
        _state(rollout, endpoint, draw, steps, form, kappa)
        for endpoint in endpoints
        for draw, steps in enumerate(strata)
    ]


def _state(
    rollout: Rollout, endpoint: Endpoint, draw: int, steps: np.ndarray, form: Form, kappa: float
) -> State:
    key = rollout.noise.key(endpoint.unit, AFTERWARDS - draw, (endpoint.slot,))
    step = int(np.random.default_rng(abs(key)).choice(steps))
    sigma = rollout.grid.sigmas[step].item()
    eps = rollout.noise.sample([key], endpoint.latent.shape, endpoint.latent.device)[0]
    x = (1 - sigma) * endpoint.latent + sigma * eps
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
    """This rank's finished latents: all of them, or of every group the best and the worst, of equal
    ones the first."""
    if pick == "all":
        return rollout.endpoints
    labels, chosen = rollout.slots.groups(rollout.over), set()
    for label in np.unique(labels[advantages.valid]):
        members = np.flatnonzero((labels == label) & advantages.valid)
        values = advantages.values[members]
        chosen |= {int(members[values.argmax()]), int(members[values.argmin()])}
    return [endpoint for endpoint in rollout.endpoints if endpoint.slot in chosen]
