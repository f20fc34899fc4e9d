"""The sampling step as numbers: for each step of a sigma grid the scalars (a, b, tau) of x' = a x + b v + tau eps.

Formulas: DESIGN section 2. `flow` is the SDE of Flow-GRPO (arXiv 2505.05470, eq. 9), `dance` that of DanceGRPO
(arXiv 2505.07818), `cps` the coefficients-preserving step of FlowCPS (arXiv 2509.05952); tau = 0 is the ODE step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Coefficients:
    """Scalars of every step of a grid, fp32 [T] each, on the CPU."""

    a: torch.Tensor
    b: torch.Tensor
    tau: torch.Tensor


def ode_coefficients(sigmas: torch.Tensor) -> Coefficients:
    """x' = x + dt v. sigmas: [T + 1], falling from 1 to 0."""
    dt = torch.diff(sigmas.double()).float()
    return Coefficients(torch.ones_like(dt), dt, torch.zeros_like(dt))


def sde_coefficients(sigmas: torch.Tensor, kind: str, eta: float) -> Coefficients:
    """Scalars of the stochastic step of `kind` ("flow", "dance" or "cps"); sigmas: [T + 1], falling from 1 to 0.

    Raises KeyError for another kind.
    """
    step = {"flow": _flow, "dance": _dance, "cps": _cps}[kind]
    grid = sigmas.double().tolist()
    rows = [step(s, s_next, grid[1], eta) for s, s_next in zip(grid[:-1], grid[1:], strict=True)]
    a, b, tau = torch.tensor(rows, dtype=torch.float64).float().unbind(1)
    return Coefficients(a, b, tau)


def _flow(s: float, s_next: float, s_first: float, eta: float) -> tuple[float, float, float]:
    # A static shift can leave the first sigma an fp32 rounding away from 1.
    return _langevin(s, s_next, eta * math.sqrt(s / (1 - (s_first if s > 1 - 1e-6 else s))))


def _dance(s: float, s_next: float, s_first: float, eta: float) -> tuple[float, float, float]:
    return _langevin(s, s_next, eta)


def _langevin(s: float, s_next: float, std: float) -> tuple[float, float, float]:
    dt = s_next - s
    drift = std * std / (2 * s)
    return 1 + drift * dt, (1 + drift * (1 - s)) * dt, std * math.sqrt(-dt)


def _cps(s: float, s_next: float, s_first: float, eta: float) -> tuple[float, float, float]:
    tau = s_next * math.sin(eta * math.pi / 2)
    q = math.sqrt(s_next * s_next - tau * tau)
    return (1 - s_next) + q, q * (1 - s) - s * (1 - s_next), tau


def noise_weights(tau: torch.Tensor, steps: list[int], weighting: str) -> torch.Tensor:
    """Loss weight of every step, fp32 [T]: tau over its mean on the trained steps, or 1 ("uniform"); 0 elsewhere."""
    weights = torch.zeros_like(tau)
    weights[steps] = tau[steps] / tau[steps].mean() if weighting == "noise" else 1.0
    return weights
