"""The coefficients of sampling steps: for each step of a sigma grid the scalars (a, b, tau) of
x' = a x + b v + tau eps.

tau = 0 is a step of the ODE; each SDE is a class here. The derivations are in docs/method.md. Grids
come from the checkpoint's scheduler (`Policy.sigmas`); the step itself is `tempflow_kernels`'.
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
    """The scalars of all T steps of a grid, fp32 [T] each on the CPU."""

    a: torch.Tensor
    """Factor of the latent."""
    b: torch.Tensor
    """Factor of the velocity."""
    tau: torch.Tensor
    """Standard deviation of the noise."""


@dataclass(frozen=True)
class Grid:
    """A sampling grid and the coefficients of its stochastic steps."""

    sigmas: torch.Tensor
    """fp32 [T + 1] on the CPU, falling from 1 to 0."""
    sde: Coefficients


# Third part of the seed of jitter, which keeps its random numbers apart from those of plans, whose
# seed is (run seed, iteration), too.
JITTER = 1


def jittered(sigmas: torch.Tensor, jitter: float, run_seed: int, iteration: int) -> torch.Tensor:
    """The grid of an iteration, with each inner sigma moved by at most `jitter` times half the gap
    to its nearer neighbor.

    sigma_k + jitter u_k min(sigma_{k-1} - sigma_k, sigma_k - sigma_{k+1}) / 2, with u_k uniform in
    [-1, 1]. The grid still falls, and its ends do not move.

    Args:
        sigmas: fp32 [T + 1], falling from 1 to 0.
        jitter: in [0, 1); 0 returns the grid itself.
        run_seed: with the iteration, the seed of the u_k.
        iteration: of the run.

    Returns:
        fp32 [T + 1].
    """
    if jitter == 0:
        return sigmas
    moved = sigmas.double().clone()
    gaps = -torch.diff(moved)
    u = np.random.default_rng([run_seed, iteration, JITTER]).uniform(-1, 1, len(gaps) - 1)
    moved[1:-1] += jitter / 2 * torch.minimum(gaps[:-1], gaps[1:]) * torch.from_numpy(u)
    return moved.float()


def ode_coefficients(sigmas: torch.Tensor) -> Coefficients:
    """The coefficients of Euler's steps of the ODE, x' = x + dt v, for sigmas [T + 1] that fall
    from 1 to 0."""
    # The difference is taken in fp64 and rounded once.
    dt = torch.diff(sigmas.double()).float()
    return Coefficients(torch.ones_like(dt), dt, torch.zeros_like(dt))


class Sde(ABC):
    """A kind of stochastic step.

    If `takes_levels` is true, `coefficients` takes a second argument: a factor for the noise of
    each step, [T], or None for 1. The drift then follows the changed noise, so that the marginal
    distributions stay the same.
    """

    takes_levels: bool = False
    """Whether the noise of each step can be scaled (`rollout.adapt`)."""

    @abstractmethod
    def coefficients(self, sigmas: torch.Tensor) -> Coefficients:
        """The coefficients of every step.

        Args:
            sigmas: [T + 1], falling from 1 to 0.

        Returns:
            fp32 [T] each. Those of the last step, which takes no noise, are not used.
        """


class Flow(Sde):
    """The SDE of Flow-GRPO (arXiv 2505.05470), whose noise grows towards sigma 1.

    Args:
        eta: noise level, above 0.
    """

    takes_levels = True

    def __init__(self, eta: float = 0.7):
        check_range("eta", eta, above=0)
        self.eta = eta

    def coefficients(self, sigmas, levels=None):
        # The noise is eta sqrt(s / (1 - s)), which is infinite at sigma 1; there the next sigma of
        # the grid takes the place of s in 1 - s. A static shift can leave the first sigma an fp32
        # rounding away from 1, hence the tolerance.
        first = sigmas.double()[1].item()

        def step(s: float, s_next: float, level: float):
            return _langevin(
                s, s_next, level * (self.eta * math.sqrt(s / (1 - (first if s > 1 - 1e-6 else s))))
            )

        return _steps(sigmas, step, levels)


class Dance(Sde):
    """The SDE of DanceGRPO (arXiv 2505.07818), with the same noise level at every sigma.

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
    """The coefficients-preserving step of FlowCPS (arXiv 2509.05952), which replaces a part of the
    remaining noise by new noise.

    Args:
        eta: noise level, above 0 and at most 1.
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
    """The step of arXiv 2605.23522: a coefficients-preserving step with more noise where the step
    removes more.

    tau = s' sqrt(1 - rho^(eta^2)) with rho = s' (1 - s) / (s (1 - s')), the ratio of the
    noise-to-data ratios after and before the step. The first step, from pure noise, has rho = 0,
    so all of its noise is new.

    Args:
        eta: noise level, above 0 and at most 10.
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
    """The coefficients along a grid, from step(sigma, next sigma, factor of the noise), which
    returns (a, b, tau)."""
    # Python floats, so all arithmetic is fp64 and each coefficient is rounded to fp32 once.
    grid = sigmas.double().tolist()
    rows = [
        step(*one)
        for one in zip(grid[:-1], grid[1:], levels or [1.0] * (len(grid) - 1), strict=True)
    ]
    a, b, tau = torch.tensor(rows, dtype=torch.float64).float().unbind(1)
    return Coefficients(a, b, tau)


def _langevin(s: float, s_next: float, std: float) -> tuple[float, float, float]:
    """The Euler-Maruyama step of the SDE with noise level `std` and the marginals of the ODE."""
    dt = s_next - s
    drift = std * std / (2 * s)
    return 1 + drift * dt, (1 + drift * (1 - s)) * dt, std * math.sqrt(-dt)


def _preserving(s: float, s_next: float, tau: float) -> tuple[float, float, float]:
    """The coefficients-preserving step: what it keeps of the old noise and the new noise together
    have variance s'^2, as the marginal at s' asks."""
    tau = min(tau, s_next)  # s' is the whole noise at s'; a level cannot make it more
    q = math.sqrt(s_next * s_next - tau * tau)
    return (1 - s_next) + q, q * (1 - s) - s * (1 - s_next), tau
