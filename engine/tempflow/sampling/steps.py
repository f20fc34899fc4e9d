"""The sampling step as numbers: for each step of a sigma grid the scalars (a, b, tau) of x' = a x +
b v + tau eps.

Formulas: docs/method.md. tau = 0 is the ODE step; each SDE is a class here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

from tempflow.errors import check_range


@dataclass(frozen=True)
class Coefficients:
    """Scalars of every step of a grid, fp32 [T] each, on the CPU."""

    a: torch.Tensor
    b: torch.Tensor
    tau: torch.Tensor


@dataclass(frozen=True)
class Grid:
    """A sampling grid: sigmas, fp32 [T + 1] on the CPU, falling from 1 to 0, and its stochastic
    steps."""

    sigmas: torch.Tensor
    sde: Coefficients


JITTER = 1  # the stream of random numbers that moves grids, apart from those that share its seeds


def jittered(sigmas: torch.Tensor, jitter: float, run_seed: int, iteration: int) -> torch.Tensor:
    """The grid of an iteration: every inner sigma moves by at most `jitter` times half the gap to
    its nearer neighbor.

    sigma_k + jitter u_k min(sigma_{k-1} - sigma_k, sigma_k - sigma_{k+1}) / 2, with u_k uniform in
    [-1, 1]. The grid still falls, and its ends stay.

    Args:
        sigmas: fp32 [T + 1], falling from 1 to 0.
        jitter: in [0, 1); 0 returns the grid itself.
        run_seed, iteration: what the u_k follow from.
    """
    if jitter == 0:
        return sigmas
    moved = sigmas.double().clone()
    gaps = -torch.diff(moved)
    u = np.random.default_rng([run_seed, iteration, JITTER]).uniform(-1, 1, len(gaps) - 1)
    moved[1:-1] += jitter / 2 * torch.minimum(gaps[:-1], gaps[1:]) * torch.from_numpy(u)
    return moved.float()


def ode_coefficients(sigmas: torch.Tensor) -> Coefficients:
    """x' = x + dt v. sigmas: [T + 1], falling from 1 to 0."""
    dt = torch.diff(sigmas.double()).float()
    return Coefficients(torch.ones_like(dt), dt, torch.zeros_like(dt))


class Sde(ABC):
    """A kind of stochastic step.

    `coefficients` of a class with `takes_levels` takes a second argument: factors of the noise of
    every step, [T], or None for 1. The rest of the step is then that of an SDE with so much noise,
    so that the marginal stays what it was to be.
    """

    takes_levels: bool = False

    @abstractmethod
    def coefficients(self, sigmas: torch.Tensor) -> Coefficients:
        """The scalars of every step. sigmas: [T + 1], falling from 1 to 0."""


class Flow(Sde):
    """The SDE of Flow-GRPO (arXiv 2505.05470): noise that grows towards sigma 1.

    Args:
        eta: noise level, above 0.
    """

    takes_levels = True

    def __init__(self, eta: float = 0.7):
        check_range("eta", eta, above=0)
        self.eta = eta

    def coefficients(self, sigmas, levels=None):
        # A static shift can leave the first sigma an fp32 rounding away from 1, where the next one
        # stands in.
        first = sigmas.double()[1].item()

        def step(s: float, s_next: float, level: float):
            return _langevin(
                s, s_next, level * (self.eta * math.sqrt(s / (1 - (first if s > 1 - 1e-6 else s))))
            )

        return _steps(sigmas, step, levels)


class Dance(Sde):
    """The SDE of DanceGRPO (arXiv 2505.07818): the same noise at every sigma.

    Args:
        eta: noise level, above 0.
    """

    takes_levels = True

    def __init__(self, eta: float = 0.7):
        check_range("eta", eta, above=0)
        self.eta = eta

    def coefficients(self, sigmas, levels=None):
        return _steps(
            sigmas, lambda s, s_next, level: _langevin(s, s_next, level * self.eta), levels
        )


class Cps(Sde):
    """The coefficients-preserving step of FlowCPS (arXiv 2509.05952): the noise that it adds is
    noise that it took away.

    Args:
        eta: noise level, above 0, at most 1.
    """

    takes_levels = True

    def __init__(self, eta: float = 0.7):
        check_range("eta", eta, above=0, most=1)
        self.eta = eta

    def coefficients(self, sigmas, levels=None):
        return _steps(sigmas, self._step, levels)

    def _step(self, s: float, s_next: float, level: float) -> tuple[float, float, float]:
        return _preserving(s, s_next, level * (s_next * math.sin(self.eta * math.pi / 2)))


class Precise(Sde):
    """The step of arXiv 2605.23522: a coefficients-preserving one that takes the more noise, the
    more noise the step removes.

    tau = s' sqrt(1 - rho^(eta^2)) with rho = s' (1 - s) / (s (1 - s')), the ratio of the
    noise-to-data ratios after and before the step. The first step, from pure noise, has rho = 0:
    all of its noise is fresh.

    Args:
        eta: noise level, above 0, at most 10.
    """

    takes_levels = True

    def __init__(self, eta: float = 1.5):
        check_range("eta", eta, above=0, most=10)
        self.eta = eta

    def coefficients(self, sigmas, levels=None):
        return _steps(sigmas, self._step, levels)

    def _step(self, s: float, s_next: float, level: float) -> tuple[float, float, float]:
        # A first sigma that is 1 up to an fp32 rounding counts as 1: a small power of a rounding
        # error is not small.
        rho = 0.0 if s > 1 - 1e-6 else s_next * (1 - s) / (s * (1 - s_next))
        return _preserving(
            s, s_next, level * (s_next * math.sqrt(1 - rho ** (self.eta * self.eta)))
        )


def _steps(
    sigmas: torch.Tensor,
    step: Callable[[float, float, float], tuple[float, float, float]],
    levels: list[float] | None,
) -> Coefficients:
    """(a, b, tau) of step(sigma, next sigma, factor of the noise) along a grid."""
    grid = sigmas.double().tolist()
    rows = [
        step(*one)
        for one in zip(grid[:-1], grid[1:], levels or [1.0] * (len(grid) - 1), strict=True)
    ]
    a, b, tau = torch.tensor(rows, dtype=torch.float64).float().unbind(1)
    return Coefficients(a, b, tau)


def _langevin(s: float, s_next: float, std: float) -> tuple[float, float, float]:
    dt = s_next - s
    drift = std * std / (2 * s)
    return 1 + drift * dt, (1 + drift * (1 - s)) * dt, std * math.sqrt(-dt)


def _preserving(s: float, s_next: float, tau: float) -> tuple[float, float, float]:
    """The step whose noise part, what is left of the old and the fresh together, has variance s'^2:
    FlowCPS's promise."""
    tau = min(tau, s_next)  # all of the noise is fresh; a level cannot ask for more
    q = math.sqrt(s_next * s_next - tau * tau)
    return (1 - s_next) + q, q * (1 - s) - s * (1 - s_next), tau
