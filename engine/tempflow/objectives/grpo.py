"""The clipped objective of GRPO, computed by one fused kernel (equation (3) of docs/method.md)."""

from __future__ import annotations

from typing import Literal

import torch

from tempflow.errors import check_range
from tempflow.objectives.base import Objective, kernel_loss


class Grpo(Objective):
    """The clipped policy-gradient loss of GRPO: max(-A ratio, -A clip(ratio)), mean over the
    children of all states.

    Args:
        clip_low: the ratio is clipped below at 1 - this.
        clip_high: the ratio is clipped above at 1 + this.
        ratio: "plain"; or "guard", the normalized ratio of GRPO-Guard (arXiv 2510.22319).
    """

    # The ranges are small because log-probabilities are means over the latent's elements, not sums.

    def __init__(
        self,
        clip_low: float = 1e-4,
        clip_high: float = 1e-4,
        ratio: Literal["plain", "guard"] = "plain",
    ):
        check_range("clip_low", clip_low, above=0, below=1)
        check_range("clip_high", clip_high, above=0)
        self.clip_low, self.clip_high, self.ratio = clip_low, clip_high, ratio
        # Guard's ratio measures from the old policy's mean, which its velocity gives.
        self.keeps_velocity = ratio == "guard"

    @property
    def takes_maps(self) -> bool:
        # Of the plain ratio `pull` is the whole loss, and `Objective.loss` takes any pull.
        return self.ratio == "plain"

    def pull(self, advantage, log_ratio, distance):
        # Training uses `loss`, whose kernel has the same gradient; tests compare the two.
        ratio = torch.exp(log_ratio)
        past = (advantage > 0) & (ratio > 1 + self.clip_high) | (advantage < 0) & (
            ratio < 1 - self.clip_low
        )
        return torch.where(past, 0.0, advantage * ratio)

    def loss(self, velocity, batch, old, penalty, velocity_ref):
        if batch.maps is not None:
            return super().loss(velocity, batch, old, penalty, velocity_ref)
        return kernel_loss(
            velocity,
            batch,
            batch.advantage,
            old,
            penalty,
            velocity_ref,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ratio=self.ratio,
        )
