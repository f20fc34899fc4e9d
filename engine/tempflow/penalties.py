"""Penalties: what holds the policy to the one before training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

from tempflow.errors import check_range


class Penalty(ABC):
    """A divergence from the reference policy, added to the loss of every state that counts, whatever the state's weight.

    coef: what it is multiplied by. kernel: (coefficient, form) where the loss kernel has it; None: it is computed here.
    """

    coef: float
    kernel: tuple[float, str] | None = None

    @abstractmethod
    def divergence(self, velocity: torch.Tensor, reference: torch.Tensor, b: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """fp32 [N], differentiable in `velocity` [N, ...]; b, tau: fp32 [N] of the states' steps."""


class Kl(Penalty):
    """KL divergence of a step from the reference policy's, as a mean over the latent's elements.

    Args:
        coef: beta, its weight in the loss, above 0.
        form: "x", of the means of the steps over tau, or "v", the plain distance of the velocities.
    """

    def __init__(self, coef: float, form: Literal["x", "v"] = "x"):
        check_range("coef", coef, above=0)
        self.coef, self.form, self.kernel = coef, form, (coef, form)

    def divergence(self, velocity, reference, b, tau):
        apart = (velocity.float() - reference.float()).square().flatten(1).mean(1)
        if self.form == "v":
            return apart
        return torch.where(tau == 0, 0.0, 0.5 * (b / torch.where(tau == 0, 1.0, tau)) ** 2 * apart)
