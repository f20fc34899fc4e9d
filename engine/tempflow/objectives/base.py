"""The protocol of objectives, and the micro-batch that they see.

An objective says what the rollout keeps, which states are trained on, and how a child pulls on the
velocity. Micro-batches, their padding over ranks, the old policy's values and the optimizer are the
updater's affair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from tempflow.penalties import Penalty
from tempflow.sampling.noise import Noise
from tempflow.sampling.steps import Grid
from tempflow.types import Advantages, Endpoint, Slots, State, Unit
from tempflow_kernels import group_loss

NEVER: dict[str, Any] = {"clip_low": 1.0, "clip_high": 1e30}  # a clip that changes nothing


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
    over: str
    """Whose rewards were compared: see `Slots.groups`."""


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
    valid: torch.Tensor
    """bool [N, B]: False for children whose reward failed, and for copies that fill up a state of
    fewer children."""
    step: torch.Tensor | None = None
    """int64 [N]: the states' places in the sampling grid, which a penalty on some steps asks
    for."""


@dataclass(frozen=True)
class Old:
    """What the policy before the updates said of a micro-batch."""

    log_prob: torch.Tensor
    """fp32 [N, B]."""
    velocity: torch.Tensor | None
    """[N, ...], where the objective or a penalty asks for it."""


class Seen(NamedTuple):
    """What was measured of a micro-batch, detached. Scalars are means over the states whose weight
    is not 0."""

    ratio: torch.Tensor
    """fp32 [N, B], of the policy to the old one."""
    log_prob: torch.Tensor
    """fp32 [N, B], of the children under the policy."""
    kl: torch.Tensor
    """fp32 [], to the reference policy."""
    clip_fraction: torch.Tensor
    """fp32 [], share of the children that count as clipped."""
    clipped_above: torch.Tensor | None = None
    """fp32 [], share of those that are clipped with a ratio above 1; None: those whose ratio is
    above 1 + clip_high."""


class Objective(ABC):  # noqa: B024 (one of two methods is abstract)
    """What an update minimizes.

    Write `pull`, or `loss` where a loss is no function of the children's log-ratios. `clip_low` and
    `clip_high` bound what metrics report as clipped.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if all(
            getattr(cls, name) is getattr(Objective, name)
            for name in ("pull", "batch_pull", "loss")
        ):
            raise TypeError(f"{cls.__name__} defines neither `pull` nor `loss`")

    wants: Literal["states", "endpoints"] = "states"
    """What the rollout keeps: the states that its rows left, or every row's final latent."""
    ratio: Literal["plain", "guard"] = "plain"
    """Of likelihoods, or normalized as by GRPO-Guard, whose gradient is tau times as large: what
    `training.weighting` divides by."""
    keeps_velocity = False
    """Whether `Old` holds the old policy's velocity."""
    compares_children = False
    """Whether a state needs two children or more to be learned from."""
    stops_children = False
    """Whether `pull` is 0 for children that have moved far enough, and these are what metrics
    report as clipped."""
    clip_low: float = NEVER["clip_low"]
    clip_high: float = NEVER["clip_high"]

    def states(self, rollout: Rollout, advantages: Advantages) -> list[State]:
        """The states of this rank that are trained on: the rollout's own, or what an objective
        makes of its endpoints."""
        return rollout.states

    def filler(self, rollout: Rollout) -> State:
        """What pads the micro-batches of a rank on which `states` finds none."""
        return rollout.states[0]

    def pull(
        self, advantage: torch.Tensor, log_ratio: torch.Tensor, distance: torch.Tensor | None
    ) -> torch.Tensor:
        """-dL/d(log ratio) of each child, fp32 [N, B].

        Args:
            advantage: fp32 [N, B].
            log_ratio: fp32 [N, B], of the policy to the old one; 0 in the first update.
            distance: fp32 [N, 1], KL of the step to the old policy's, mean over elements; None
                unless `keeps_velocity`.
        """
        raise NotImplementedError

    def batch_pull(
        self, batch: Batch, log_ratio: torch.Tensor, distance: torch.Tensor | None
    ) -> torch.Tensor:
        """The pull of every child of a micro-batch, fp32 [N, B]; 0 for masked ones, whose advantage
        is 0."""
        return self.pull(batch.advantage, log_ratio, distance)

    def loss(
        self,
        velocity: torch.Tensor,
        batch: Batch,
        old: Old | None,
        penalty: Penalty | None,
        velocity_ref: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Seen]:
        """The loss [] of a micro-batch, differentiable in `velocity`, and what was measured on the
        way.

        Without an old policy the kernel's ratio is 1 and its gradient of -A ratio is that of -A log
        ratio, so with A = pull it is the gradient of any loss of log-ratios. The value of the loss
        is that of this linear stand-in.
        """
        with torch.no_grad():
            seen = self.measure(velocity, batch, old)
            log_ratio = (
                torch.zeros_like(seen.log_prob) if old is None else seen.log_prob - old.log_prob
            )
            distance = (
                None
                if not self.keeps_velocity
                else step_distance(velocity, old and old.velocity, batch)  # type: ignore[arg-type]  # None where there is no old policy
            )
            pull = self.batch_pull(batch, log_ratio, distance)
        loss, penalized = kernel_loss(velocity, batch, pull, None, penalty, velocity_ref, **NEVER)
        seen = seen._replace(kl=penalized.kl)
        return loss, _stopped(seen, batch, pull) if self.stops_children else seen

    def measure(self, velocity: torch.Tensor, batch: Batch, old: Old | None) -> Seen:
        """Ratios and log-probabilities under a velocity, without a gradient."""
        zero = torch.zeros_like(batch.advantage)
        return kernel_loss(
            velocity.detach(),
            batch,
            zero,
            old,
            None,
            None,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )[1]


class GroupObjective(Objective):
    """An objective whose loss is one of all children of a state together. Masked children and flat
    groups have no pull."""

    compares_children = True

    @abstractmethod
    def group_pull(
        self, advantage: torch.Tensor, log_ratio: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """-dL/d(log ratio) of each child, [N, B], of the loss L of its group; anything finite where
        `valid`, bool [N, B], is False."""

    def batch_pull(self, batch, log_ratio, distance):
        pull = self.group_pull(batch.advantage, log_ratio, batch.valid)
        # A group without spread teaches nothing, whether or not a penalty has it forwarded.
        return torch.where(batch.valid & (batch.advantage != 0).any(1, keepdim=True), pull, 0.0)


def _stopped(seen: Seen, batch: Batch, pull: torch.Tensor) -> Seen:
    """With the share of valid children of each state whose pull is 0 while their advantage is
    not."""
    stopped = (pull == 0) & (batch.advantage != 0)
    live, valid = batch.weight != 0, batch.valid.sum(1).clamp(min=1)

    def share(chosen: torch.Tensor) -> torch.Tensor:
        return torch.where(live, chosen.sum(1) / valid, 0.0).sum() / live.sum().clamp(min=1)

    return seen._replace(
        clip_fraction=share(stopped), clipped_above=share(stopped & (seen.ratio > 1))
    )


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
) -> tuple[torch.Tensor, Seen]:
    """`tempflow_kernels.group_loss` of a micro-batch; a penalty that the kernel has is added
    there."""
    fused = penalty.kernel if penalty is not None and velocity_ref is not None else None
    coef, form = fused or (0.0, "x")
    loss, stats = group_loss(
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
    return loss, Seen(stats.ratio, stats.log_prob, stats.kl, stats.clip_fraction)


def step_distance(
    velocity: torch.Tensor, velocity_old: torch.Tensor | None, batch: Batch
) -> torch.Tensor:
    """KL of the step's Gaussian to the old policy's, b^2 mean((v - v_old)^2) / (2 tau^2), fp32 [N,
    1]; 0 without an old one."""
    if velocity_old is None:
        return torch.zeros_like(batch.b)[:, None]
    apart = (velocity.detach().float() - velocity_old.float()).flatten(1).square().mean(1)
    return (batch.b.square() * apart / (2 * batch.tau.square()))[:, None]
