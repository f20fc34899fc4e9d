"""The loss of advantages that differ by place of a latent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # base imports this module
    from tempflow.objectives.base import Batch


def local_loss(velocity: torch.Tensor, batch: Batch, pull: torch.Tensor) -> torch.Tensor:
    """The loss -mean(weight * mean(pull * log p)) [], where log p is the log-density of each
    element of a child.

    With the same pull at every place its gradient is that of `group_loss`, equation (4) of
    docs/method.md. The gradient is exact; the value has 1 in the place of log p, as -pull times the
    ratio has it in the first update.

    Args:
        velocity: [N, ...] of the policy.
        batch: the micro-batch.
        pull: fp32, broadcasts over the children [N, B, ...]; 0 for masked children.
    """
    rows, children = batch.children.shape[:2]
    per_state = (slice(None), *[None] * (velocity.ndim - 1))
    with torch.no_grad():
        center = batch.a[per_state] * batch.x + batch.b[per_state] * velocity.float()
        grad = torch.zeros_like(center)
        # A loop over the children holds [N, ...] at a time; one expression would hold [N, B, ...].
        for i in range(children):
            # Selected, not multiplied: a masked child may hold NaN, and 0 * NaN is NaN.
            grad += torch.where(
                pull[:, i] == 0, 0.0, pull[:, i] * (batch.children[:, i].float() - center)
            )
        slope = batch.weight * batch.b / (batch.tau**2 * children * grad[0].numel() * rows)
        moves = (batch.weight != 0) & (batch.tau != 0)
        grad = torch.where(moves[per_state], -slope[per_state] * grad, 0.0)
        value = -(batch.weight * pull.flatten(1).mean(1)).mean()
    # Linear in the velocity, with that gradient, and minus itself, so that the value is the loss's.
    linear = (velocity.float() * grad).sum()
    return value + linear - linear.detach()
