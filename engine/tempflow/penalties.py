"""Penalties: what holds the policy to the one before training, or to the one before an iteration's
updates.

Both policies take the same noise, so divergences of their steps are functions of one number per
state, z^2 = |mean - mean'|^2 / tau^2 with mean - mean' = b (v - v'). The sum over the latent's D
elements is a mean here, as it is in log-probabilities, times an option `scale`; with scale = D it
is the divergence of the joint density.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

from tempflow.errors import UserError, check_range, shown

To = Literal["reference", "old"]
FIRST_STEPS = [0, 1, 2]
# of z^2 under an exponential, which goes on along its tangent: e^20 leaves fp32 room for sums
MOST = 20.0


class Penalty(ABC):
    """A divergence from another policy, added to the loss of every state that it acts on, whatever
    the state's weight."""

    coef: float
    """What the divergence is multiplied by."""
    to: To = "reference"
    """The policy before training, or the one before an iteration's updates."""
    steps: list[int] | None = None
    """Places in the sampling grid on whose states it acts; None: all."""
    kernel: tuple[float, str] | None = None
    """(coefficient, form) where the loss kernel computes it; None: it is computed here."""

    @property
    def needs_reference(self) -> bool:
        """Whether the policy before training has to be kept and forwarded."""
        return self.to == "reference"

    def acts_on(self, step: int) -> bool:
        """Whether a state at a step of the grid pays."""
        return self.steps is None or step in self.steps

    @abstractmethod
    def divergence(
        self, velocity: torch.Tensor, reference: torch.Tensor, b: torch.Tensor, tau: torch.Tensor
    ) -> torch.Tensor:
        """fp32 [N], differentiable in `velocity` [N, ...]; b, tau: fp32 [N] of the states'
        steps."""


def apart(velocity: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """mean((v - v')^2) of velocities [N, ...], fp32 [N]."""
    return (velocity.float() - reference.float()).square().flatten(1).mean(1)


def over_noise(b: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """(b / tau)^2, fp32 [N]; 0 where a step takes no noise."""
    return torch.where(tau == 0, 0.0, (b / torch.where(tau == 0, 1.0, tau)) ** 2)


def checked(steps: list | None) -> list[int] | None:
    """UserError for what is no list of steps."""
    if (
        steps is None
        or isinstance(steps, list)
        and steps
        and all(type(k) is int and k >= 0 for k in steps)
    ):
        return steps
    raise UserError(
        "steps: expected null or a list of places in the sampling grid from 0 on, got"
        f" {shown(steps)}"
    )


class Kl(Penalty):
    """KL divergence of a step from the other policy's, as a mean over the latent's elements.

    Args:
        coef: beta, its weight in the loss, above 0.
        form: "x", of the means of the steps over tau, or "v", the plain distance of the velocities.
        to: "reference", the policy before training, or "old", the one before an iteration's
            updates, which costs no forward.
        steps: places in the sampling grid on whose states it acts; null: all.
    """

    def __init__(
        self,
        coef: float,
        form: Literal["x", "v"] = "x",
        to: To = "reference",
        steps: list | None = None,
    ):
        check_range("coef", coef, above=0)
        self.coef, self.form, self.to, self.steps = coef, form, to, checked(steps)
        self.kernel = (coef, form) if steps is None else None

    def divergence(self, velocity, reference, b, tau):
        squared = apart(velocity, reference)
        return squared if self.form == "v" else 0.5 * over_noise(b, tau) * squared


class ChannelKl(Penalty):
    """KL divergence of the channel means of a step from the other policy's: holds color and
    brightness, leaves structure free.

    A latent's mean over its positions decides what an image looks like on the whole; words, layout
    and detail hardly change it. Its Gaussian has the mean of mu over positions and the variance
    tau^2 / positions; per element the divergence is b^2 mean_channels(mean_positions(v - v')^2) /
    (2 tau^2), never more than that of the whole latent, so coefficients compare.

    Args:
        coef: its weight in the loss, above 0.
        to: "reference", the policy before training, or "old", the one before an iteration's
            updates, which costs no forward.
        steps: places in the sampling grid on whose states it acts; null: all.
    """

    def __init__(self, coef: float, to: To = "reference", steps: list | None = None):
        check_range("coef", coef, above=0)
        self.coef, self.to, self.steps = coef, to, checked(steps)

    def divergence(self, velocity, reference, b, tau):
        return (
            0.5
            * over_noise(b, tau)
            * channel_means(velocity.float() - reference.float()).square().mean(1)
        )


def channel_means(latents: torch.Tensor) -> torch.Tensor:
    """Mean over positions, [N, C], of latents [N, tokens, C] or [N, C, ..., H, W]."""
    return latents.mean(1) if latents.ndim == 3 else latents.flatten(2).mean(2)


class W2(Penalty):
    """Squared Wasserstein-2 distance of a step from the other policy's, b^2 mean((v - v')^2)
    (DiverseGRPO).

    Args:
        coef: its weight in the loss, above 0.
        to: "reference", the policy before training, or "old", the one before an iteration's
            updates, which costs no forward.
        steps: places in the sampling grid on whose states it acts; null: all.
    """

    def __init__(self, coef: float, to: To = "reference", steps: list | None = FIRST_STEPS):
        check_range("coef", coef, above=0)
        self.coef, self.to, self.steps = coef, to, checked(steps)

    def divergence(self, velocity, reference, b, tau):
        return b.square() * apart(velocity, reference)


# -------------------------------------------------------------- functions of z^2 (arXiv 2503.06171)
class OfDistance(Penalty):
    """A function of z^2, the squared distance of two steps in units of their noise.

    Args:
        coef: its weight in the loss, above 0.
        to: "reference", the policy before training, or "old", the one before an iteration's
            updates, which costs no forward.
        scale: what the mean over elements of z^2 is multiplied by, above 0. With 1, z^2 is so small
            that all divergences are KL times a constant; with the number of elements it is that of
            the joint density.
        steps: places in the sampling grid on whose states it acts; null: all.
    """

    def __init__(
        self, coef: float, to: To = "reference", scale: float = 1.0, steps: list | None = None
    ):
        check_range("coef", coef, above=0)
        check_range("scale", scale, above=0)
        self.coef, self.to, self.scale, self.steps = coef, to, scale, checked(steps)

    def divergence(self, velocity, reference, b, tau):
        return self.of(self.scale * over_noise(b, tau) * apart(velocity, reference))

    @abstractmethod
    def of(self, z2: torch.Tensor) -> torch.Tensor:
        """The divergence of Gaussians of equal covariance at z^2, fp32 [N]."""


class Jeffreys(OfDistance):
    """Sum of the KL divergences in both directions: z^2."""

    def of(self, z2):
        return z2


class Hellinger(OfDistance):
    """Squared Hellinger distance, 1 - exp(-z^2 / 8): bounded, so it stops pulling far out."""

    def of(self, z2):
        return -torch.expm1(-z2 / 8)


class Chi2(OfDistance):
    """Pearson's chi-squared divergence, exp(z^2) - 1: forbids what is far out; above z^2 = 20 its
    tangent, so that it stays finite."""

    def of(self, z2):
        near = z2.clamp(max=MOST)
        return torch.expm1(near) + torch.exp(near).detach() * (z2 - near)


class Renyi(OfDistance):
    """Renyi divergence of an order, order z^2 / 2.

    Args:
        order: above 0; 1 is KL.
    """

    def __init__(
        self,
        coef: float,
        order: float = 0.5,
        to: To = "reference",
        scale: float = 1.0,
        steps: list | None = None,
    ):
        super().__init__(coef, to, scale, steps)
        check_range("order", order, above=0)
        self.order = order

    def of(self, z2):
        return self.order * z2 / 2


class Alpha(OfDistance):
    """Alpha divergence of an order, (1 - exp(-order (1 - order) z^2 / 2)) / (order (1 - order)):
    bounded, KL for small z.

    Args:
        order: above 0, below 1.
    """

    def __init__(
        self,
        coef: float,
        order: float = 0.5,
        to: To = "reference",
        scale: float = 1.0,
        steps: list | None = None,
    ):
        super().__init__(coef, to, scale, steps)
        check_range("order", order, above=0, below=1)
        self.order = order

    def of(self, z2):
        c = self.order * (1 - self.order)
        return -torch.expm1(-c * z2 / 2) / c


class TotalVariation(OfDistance):
    """Total variation, 2 Phi(z / 2) - 1: bounded, and of the same slope however small z is."""

    def of(self, z2):
        # without a gradient at 0, where the slope has no direction
        z = torch.where(z2 > 0, torch.where(z2 > 0, z2, 1.0).sqrt(), 0.0)
        return torch.erf(z / 8**0.5)
