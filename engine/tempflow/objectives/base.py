"""The protocol of objectives, and the micro-batch that they see.

An objective says what the rollout keeps, which states are trained on, and how a child pulls on the velocity. Micro-batches, their
padding over ranks, the old policy's values and the optimizer are the updater's affair.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Literal

import torch

from tempflow.penalties import Penalty
from tempflow.sampling.noise import Noise
from tempflow.sampling.steps import Grid
from tempflow.types import Advantages, Endpoint, Slots, State, Unit
from tempflow_kernels import GroupStats, group_loss

NEVER = {"clip_low": 1.0, "clip_high": 1e30}  # a clip that changes nothing


@dataclass(frozen=True)
class Rollout:
    """What an iteration's integration leaves on this rank to train on."""

    slots: Slots
    """Of all ranks."""
    states: list[State]
    """Of this rank, by unit and step; empty where the objective wants endpoints."""
    endpoints: list[Endpoint]
    """Of this rank, by row; empty where the objective wants states."""
    grid: Grid
    """What was integrated on."""
    noise: Noise
    """Of the iteration, for objectives that draw more."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: N states of B children each."""

    units: list[Unit]
    """N."""
    x: torch.Tensor
    """fp32 [N, ...]."""
    children: torch.Tensor
    """fp32 [N, B, ...]."""
    sigma: torch.Tensor
    """fp32 [N], as a, b and tau."""
    a: torch.Tensor
    b: torch.Tensor
    tau: torch.Tensor
    weight: torch.Tensor
    """fp32 [N]: a state's share of the loss; 0 for padding."""
    advantage: torch.Tensor
    """fp32 [N, B]."""
    log_prob_rollout: torch.Tensor | None
    """fp32 [N, B]; None where the rollout took no such step."""
    real: int
    """How many states are no padding; they come first."""


@dataclass(frozen=True)
class Old:
    """What the policy before the updates said of a micro-batch."""

    log_prob: torch.Tensor
    """fp32 [N, B]."""
    velocity: torch.Tensor | None
    """[N, ...], where the objective keeps it."""


class Objective(ABC):  # noqa: B024 (one of two methods is abstract)
    """What an update minimizes.

    Write `pull`, or `loss` where a loss is no function of the children's log-ratios. `clip_low` and `clip_high` bound what
    metrics report as clipped.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.pull is Objective.pull and cls.loss is Objective.loss:
            raise TypeError(f"{cls.__name__} defines neither `pull` nor `loss`")

    wants: Literal["states", "endpoints"] = "states"
    """What the rollout keeps: the states that its rows left, or every row's final latent."""
    keeps_velocity = False
    """Whether `Old` holds the old policy's velocity."""
    clip_low: float = NEVER["clip_low"]
    clip_high: float = NEVER["clip_high"]

    def states(self, rollout: Rollout, advantages: Advantages) -> list[State]:
        """The states of this rank that are trained on: the rollout's own, or what an objective makes of its endpoints."""
        return rollout.states

    def pull(self, advantage: torch.Tensor, log_ratio: torch.Tensor, distance: torch.Tensor | None) -> torch.Tensor:
        """-dL/d(log ratio) of each child, fp32 [N, B].

        Args:
            advantage: fp32 [N, B].
            log_ratio: fp32 [N, B], of the policy to the old one; 0 in the first update.
            distance: fp32 [N, 1], KL of the step to the old policy's, mean over elements; None unless `keeps_velocity`.
        """
        raise NotImplementedError

    def loss(
        self, velocity: torch.Tensor, batch: Batch, old: Old | None, penalty: Penalty | None, velocity_ref: torch.Tensor | None
    ) -> tuple[torch.Tensor, GroupStats]:
        """The loss [] of a micro-batch, differentiable in `velocity`, and what was measured on the way.

        The kernel's gradient of -A exp(log ratio) has the size A ratio, so with A = pull / ratio and no clip it is the gradient
        of any loss of log-ratios. The value of the loss is that of this linear stand-in.
        """
        with torch.no_grad():
            seen = self.measure(velocity, batch, old)
            log_ratio = torch.log(seen.ratio)
            distance = None if not self.keeps_velocity else step_distance(velocity, old and old.velocity, batch)
            advantage = self.pull(batch.advantage, log_ratio, distance) / seen.ratio
        loss, penalized = kernel_loss(velocity, batch, advantage, old, penalty, velocity_ref, **NEVER)
        return loss, seen._replace(kl=penalized.kl)

    def measure(self, velocity: torch.Tensor, batch: Batch, old: Old | None) -> GroupStats:
        """Ratios and log-probabilities under a velocity, without a gradient."""
        zero = torch.zeros_like(batch.advantage)
        return kernel_loss(velocity.detach(), batch, zero, old, None, None, clip_low=self.clip_low, clip_high=self.clip_high)[1]


def kernel_loss(
    velocity: torch.Tensor,
    batch: Batch,
    advantage: torch.Tensor,
    old: Old | None,
    penalty: Penalty | None,
    velocity_ref: torch.Tensor | None,
    *,
    clip_low: float,
    clip_high: float,
    ratio: str = "plain",
) -> tuple[torch.Tensor, GroupStats]:
    """`tempflow_kernels.group_loss` of a micro-batch; a penalty that the kernel has is added there."""
    fused = penalty.kernel if penalty is not None and velocity_ref is not None else None
    coef, form = fused or (0.0, "x")
    return group_loss(
        velocity,
        batch.x,
        batch.children,
        batch.a,
        batch.b,
        batch.tau,
        None if old is None else old.log_prob,
        advantage,
        batch.weight,
        clip_low=clip_low,
        clip_high=clip_high,
        velocity_ref=velocity_ref if fused else None,
        kl_coef=coef,
        kl_form=form,
        ratio=ratio,
        velocity_old=None if old is None or ratio == "plain" else old.velocity,
    )


def step_distance(velocity: torch.Tensor, velocity_old: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    """KL of the step's Gaussian to the old policy's, b^2 mean((v - v_old)^2) / (2 tau^2), fp32 [N, 1]; 0 without an old one."""
    if velocity_old is None:
        return torch.zeros_like(batch.b)[:, None]
    apart = (velocity.detach().float() - velocity_old.float()).flatten(1).square().mean(1)
    return (batch.b.square() * apart / (2 * batch.tau.square()))[:, None]
