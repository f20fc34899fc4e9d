"""Penalties: divergences that hold the policy near the one before training, or near the one before
an iteration's updates.

A step of either policy is a Gaussian with the same covariance tau^2 I. So a divergence of the two
is a function of one number per state, z^2 = |mean - mean'|^2 / tau^2 with mean - mean' = b (v -
v'). Here |.|^2 is a mean over the latent's D elements and not a sum, as in log-probabilities
(equation (2) of docs/method.md). The option `scale` multiplies it; with scale = D the result is the
divergence of the joint density.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

from tempflow.errors import UserError, check_range, shown

To = Literal["reference", "old"]
# Default of W2: where the noise is largest and the layout of the image is decided.
FIRST_STEPS = [0, 1, 2]
# Largest z^2 whose exponential is taken; beyond it the tangent continues. e^20 = 5e8 leaves fp32
# room for sums.
MOST = 20.0


class Penalty(ABC):
    """A divergence from another policy, added to the loss of every state that it acts on. Step
    weights do not apply to it."""

    coef: float
    """Factor of the divergence in the loss."""
    to: To = "reference"
    """The other policy: the one before training, or the one before an iteration's updates."""
    steps: list[int] | None = None
    """Places in the sampling grid; the penalty acts on states at these steps. None: all."""
    kernel: tuple[float, str] | None = None
    """(coefficient, form) where the loss kernel computes it; None: `divergence` does."""

    @property
    def needs_reference(self) -> bool:
        """Whether the run must keep the policy before training and forward it."""
        return self.to == "reference"

    def acts_on(self, step: int) -> bool:
        """Whether the penalty acts on states at a step of the grid."""
        return self.steps is None or step in self.steps

    @abstractmethod
    def divergence(
        self, velocity: torch.Tensor, reference: torch.Tensor, b: torch.Tensor, tau: torch.Tensor
    ) -> torch.Tensor:
        """The divergence of each state, fp32 [N].

        Args:
            velocity: [N, ...] of the policy; the result is differentiable in it.
            reference: [N, ...] of the other policy.
            b: fp32 [N], of the states' steps.
            tau: fp32 [N], of the states' steps.
        """


def apart(velocity: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """mean((v - v')^2) of velocities [N, ...], fp32 [N]."""
    # Cast before subtracting: the two nearly agree, and a bf16 difference would be mostly rounding.
    return (velocity.float() - reference.float()).square().flatten(1).mean(1)


def over_noise(b: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """(b / tau)^2, fp32 [N]; 0 where a step takes no noise."""
    # 1 in place of 0 inside: `where` computes both sides, and b / 0 would be inf.
    return torch.where(tau == 0, 0.0, (b / torch.where(tau == 0, 1.0, tau)) ** 2)


def checked(steps: list | None) -> list[int] | None:
    """The option `steps` as it is. UserError where it is neither None nor a list of steps."""
    if (
        steps is None
        or isinstance(steps, list)
        and steps
        # `type` and not isinstance: True is an int, but no step.
        and all(type(k) is int and k >= 0 for k in steps)
    ):
        return steps
    raise UserError(
        "steps: expected null or a list of places in the sampling grid (integers from 0 on), got"
        f" {shown(steps)}"
    )


class Kl(Penalty):
    """KL divergence of a step from the other policy's, as a mean over the latent's elements.

    Args:
        coef: beta, weight in the loss, above 0.
        form: "x", the distance of the steps' means over tau; or "v", the distance of the
            velocities.
        to: "reference", the policy before training; or "old", the policy before an iteration's
            updates, which costs no forward.
        steps: places in the sampling grid; the penalty acts on states at these steps. null: all.
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
        # The loss kernel has no list of steps; with one, `divergence` below is used.
        self.kernel = (coef, form) if steps is None else None

    def divergence(self, velocity, reference, b, tau):
        squared = apart(velocity, reference)
        return squared if self.form == "v" else 0.5 * over_noise(b, tau) * squared


class ChannelKl(Penalty):
    """KL divergence of the channel means of a step from the other policy's: it holds color and
    brightness and leaves structure free.

    A latent's mean over its positions decides the overall color and brightness of an image; words,
    layout and detail hardly change it. That mean is Gaussian as well, with the mean of mu over
    positions and the variance tau^2 / positions. Per element of the latent, its divergence is b^2
    mean_channels(mean_positions(v - v')^2) / (2 tau^2). This is at most the divergence of the whole
    latent, so coefficients of both are comparable.

    Args:
        coef: weight in the loss, above 0.
        to: "reference", the policy before training; or "old", the policy before an iteration's
            updates, which costs no forward.
        steps: places in the sampling grid; the penalty acts on states at these steps. null: all.
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
    # The families have two layouts: packed tokens of 3 dimensions, images and videos of more.
    return latents.mean(1) if latents.ndim == 3 else latents.flatten(2).mean(2)


class W2(Penalty):
    """Squared Wasserstein-2 distance of a step from the other policy's, b^2 mean((v - v')^2)
    (DiverseGRPO).

    Unlike the KL it is not divided by the noise, so it also acts on steps without noise.

    Args:
        coef: weight in the loss, above 0.
        to: "reference", the policy before training; or "old", the policy before an iteration's
            updates, which costs no forward.
        steps: places in the sampling grid; the penalty acts on states at these steps. null: all.
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
        coef: weight in the loss, above 0.
        to: "reference", the policy before training; or "old", the policy before an iteration's
            updates, which costs no forward.
        scale: factor of the mean over elements of z^2, above 0. With 1, z^2 is so small that all
            divergences are the KL times a constant; with the number of elements, the divergence is
            that of the joint density.
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
    """Squared Hellinger distance, 1 - exp(-z^2 / 8): bounded, so its gradient vanishes far out."""

    def of(self, z2):
        # expm1: 1 - exp(-z2 / 8) would be 0 in fp32 for the small z2 of scale 1.
        return -torch.expm1(-z2 / 8)


class Chi2(OfDistance):
    """Pearson's chi-squared divergence, exp(z^2) - 1: it grows fastest far out; above z^2 = 20 its
    tangent is used, so that it stays finite."""

    def of(self, z2):
        # Below the limit z2 - near is 0 and adds nothing; above it `near` is constant, so the slope
        # is that of the detached exponential.
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
        # Tends to the KL z^2 / 2 as z does to 0, whatever the order.
        c = self.order * (1 - self.order)
        return -torch.expm1(-c * z2 / 2) / c


class TotalVariation(OfDistance):
    """Total variation, 2 Phi(z / 2) - 1: bounded, and its slope in z does not vanish at 0."""

    def of(self, z2):
        # The square root's gradient is infinite at 0, and 0 * inf is NaN. The inner `where` keeps
        # the root away from 0; the outer one gives 0 there, without a gradient: the slope has no
        # direction at 0.
        z = torch.where(z2 > 0, torch.where(z2 > 0, z2, 1.0).sqrt(), 0.0)
        return torch.erf(z / 8**0.5)
