"""Penalties: what holds the policy to the one before training."""

from __future__ import annotations

from abc import ABC
from typing import Literal

from tempflow.errors import check_range


class Penalty(ABC):  # noqa: B024
    """A divergence from the reference policy, added to the loss."""


class Kl(Penalty):
    """The KL divergence of a step from the reference policy's; needs a forward of that policy for every state.

    Args:
        coef: beta, its weight in the loss, above 0.
        form: "x", of the means of the steps over tau, or "v", the plain distance of the velocities.
    """

    def __init__(self, coef: float, form: Literal["x", "v"] = "x"):
        check_range("coef", coef, above=0)
        self.coef, self.form = coef, form
