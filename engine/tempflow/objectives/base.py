"""The protocol of objectives, and the micro-batch that they see.

An objective decides what the rollout keeps, which states are trained on, and how each child pulls
on the velocity. It does not deal with micro-batches, their padding over ranks, the storage of the
old policy's values, or the optimizer; the updater does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from tempflow.objectives.local import local_loss
from tempflow.penalties import Penalty
from tempflow.sampling.noise import Noise
from tempflow.sampling.steps import Grid
from tempflow.types import Advantages, Endpoint, Slots, State, Unit
from tempflow_kernels import group_loss

# A clip that changes nothing: the ratio is above 0, and 1e30 is finite in fp32.
NEVER: dict[str, Any] = {"clip_low": 1.0, "clip_high": 1e30}


@dataclass(frozen=True)
class Rollout:
    """What an iteration's rollout leaves on this rank to train on."""

    slots: Slots
    """The slots of all ranks."""
    states: list[State]
    """This rank's states, ordered by unit and step; empty where the objective wants endpoints."""
    endpoints: list[Endpoint]
    """This rank's finished latents, ordered by slot; empty where the objective wants states."""
    grid: Grid
    """The sampling grid of the rollout."""
    noise: Noise
    """The iteration's noise, for objectives that draw more of it."""
    over: str
    """Whose rewards were compared: a key of `Slots.OVER`."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: N states of B children each."""

    units: list[Unit]
    """The (prompt, seed) of each state, N of them."""
    x: torch.Tensor
    """fp32 [N, ...]: the latents of the states."""
    children: torch.Tensor
    """fp32 [N, B, ...]."""
    sigma: torch.Tensor
    """fp32 [N]."""
    a: torch.Tensor
    """fp32 [N]: with b and tau the scalars of the step that made the children."""
    b: torch.Tensor
    """fp32 [N]."""
    tau: torch.Tensor
    """fp32 [N]."""
    weight: torch.Tensor
    """fp32 [N]: the weight of a state in the loss; 0 for padding."""
    advantage: torch.Tensor
    """fp32 [N, B]; 0 for children that are not valid."""
    log_prob_rollout: torch.Tensor | None
    """fp32 [N, B]: log-probabilities under the rollout's velocity; None where the rollout took no
    such step."""
    real: int
    """The number of states that are not padding; they come first."""
    valid: torch.Tensor
    """bool [N, B]: False for children whose reward failed, and for copies that fill up a state with
    fewer than B children."""
    sigmas: list[float]
    """N: the values of `sigma`, which the host knows without waiting for the device."""
    step: torch.Tensor | None = None
    """int64 [N]: places in the sampling grid, for penalties that act on some steps only."""
    maps: torch.Tensor | None = None
    """fp32 [N, B, ...]: an advantage for each place, which broadcasts over the latents; 0 for
    children that are not valid. None: `advantage` holds for every place."""


@dataclass(frozen=True)
class Old:
    """The outputs of the policy before the updates for a micro-batch."""

    log_prob: torch.Tensor
    """fp32 [N, B]."""
    velocity: torch.Tensor | None
    """[N, ...] in the training dtype; None where neither the objective nor the penalty needs it."""


class Seen(NamedTuple):
    """Statistics of a micro-batch, detached. Scalars are means over the states whose weight is not
    0."""

    ratio: torch.Tensor
    """fp32 [N, B], probabilities of the children under the policy over those under the old one."""
    log_prob: torch.Tensor
    """fp32 [N, B], log-probabilities of the children under the policy."""
    kl: torch.Tensor
    """fp32 [], the penalty's divergence."""
    clip_fraction: torch.Tensor
    """fp32 [], share of the children that count as clipped."""
    clipped_above: torch.Tensor | None = None
    """fp32 [], share of the children that are clipped with a ratio above 1. None: the children
    whose ratio is above 1 + clip_high count."""


class Objective(ABC):  # noqa: B024 (one of two methods is abstract)
    """The loss of an update.

    A subclass writes `pull`, or `loss` if its loss is not a function of the children's log-ratios.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # `abstractmethod` cannot say "one of these". Checked when the class is defined, because an
        # objective without either would fail only after the first rollout.
        if all(
            getattr(cls, name) is getattr(Objective, name)
            for name in ("pull", "batch_pull", "loss")
        ):
            raise TypeError(f"{cls.__name__} defines neither `pull` nor `loss`")

    wants: Literal["states", "endpoints"] = "states"
    """What the rollout keeps: the states that children left, or every row's final latent."""
    ratio: Literal["plain", "guard"] = "plain"
    """"plain", of likelihoods; or "guard", normalized as in GRPO-Guard, with a gradient that is tau
    times as large. `training.weighting` takes that factor into account."""
    keeps_velocity = False
    """Whether `Old` holds the old policy's velocity."""
    compares_children = False
    """Whether a state needs at least two children to have a gradient."""
    stops_children = False
    """Whether `pull` is 0 for children that have moved far enough. Metrics then report these
    children as clipped."""
    clip_low: float = NEVER["clip_low"]
    """Metrics report ratios below 1 - clip_low as clipped."""
    clip_high: float = NEVER["clip_high"]
    """Metrics report ratios above 1 + clip_high as clipped."""

    @property
    def takes_maps(self) -> bool:
        """Whether a child may have an advantage for each place of its latent. An objective that
        writes `pull` alone may be used so, as `pull` then gets places for children."""
        return type(self).loss is Objective.loss and type(self).batch_pull is Objective.batch_pull

    def states(self, rollout: Rollout, advantages: Advantages) -> list[State]:
        """This rank's states to train on: the rollout's own, or states made from its endpoints."""
        return rollout.states

    def filler(self, rollout: Rollout) -> State:
        """A state that pads the micro-batches of a rank for which `states` returns none."""
        # Any one: padding has weight 0, and is there because every rank makes as many micro-batches
        # as the one with the most states.
        return rollout.states[0]

    def pull(
        self, advantage: torch.Tensor, log_ratio: torch.Tensor, distance: torch.Tensor | None
    ) -> torch.Tensor:
        """-dL/d(log ratio) of each child, fp32 [N, B].

        Args:
            advantage: fp32 [N, B].
            log_ratio: fp32 [N, B], log of `Seen.ratio`; 0 in the first update.
            distance: fp32 [N, 1], KL divergence of the step from the old policy's, as a mean over
                elements; None unless `keeps_velocity`.
        """
        raise NotImplementedError

    def batch_pull(
        self, batch: Batch, log_ratio: torch.Tensor, distance: torch.Tensor | None
    ) -> torch.Tensor:
        """The pull of every child of a micro-batch, fp32 [N, B]; must be 0 for masked children."""
        # Masked children have advantage 0, for which `pull` of a single child is 0.
        return self.pull(batch.advantage, log_ratio, distance)

    def loss(
        self,
        velocity: torch.Tensor,
        batch: Batch,
        old: Old | None,
        penalty: Penalty | None,
        velocity_ref: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Seen]:
        """The loss [] of a micro-batch, differentiable in `velocity`, and its statistics.

        The gradient is exact. The value is that of a linear stand-in, -pull times the ratio.

        Args:
            velocity: [N, ...] of the policy, in the training dtype.
            batch: the micro-batch.
            old: outputs of the policy before the updates; None in the first update, in which the
                old policy is the current one.
            penalty: what is added to the loss if the kernel computes it; None: nothing.
            velocity_ref: [N, ...] of the policy that the penalty measures from.
        """
        # Without a graph: the pull is a constant of the stand-in below, whose ratio alone carries
        # the gradient.
        with torch.no_grad():
            seen = self.measure(velocity, batch, old)
            log_ratio = (
                torch.zeros_like(seen.log_prob) if old is None else seen.log_prob - old.log_prob
            )
            distance = (
                None
                if not self.keeps_velocity
                else step_distance(velocity, None if old is None else old.velocity, batch)
            )
            pull = self.batch_pull(batch, log_ratio, distance)
            local = None if batch.maps is None else self._local_pull(batch, log_ratio, distance)
        # Without an old policy the kernel's ratio is 1, where -A ratio and -A log ratio have the
        # same gradient. So with A = pull its gradient is that of any loss of the log-ratios.
        # Where places have their own pull, that of whole children is for the statistics alone.
        whole = pull if local is None else torch.zeros_like(pull)
        loss, penalized = kernel_loss(velocity, batch, whole, None, penalty, velocity_ref, **NEVER)
        if local is not None:
            loss = loss + local_loss(velocity, batch, local)
        # The ratios of this call are 1; those to the real old policy are in `seen`.
        seen = seen._replace(kl=penalized.kl)
        return loss, _stopped(seen, batch, pull) if self.stops_children else seen

    def _local_pull(self, batch, log_ratio, distance) -> torch.Tensor:
        """The pull of every place, as of `Batch.maps`: that of its advantage at the log-ratio of
        the whole child."""
        each = (..., *[None] * (batch.maps.ndim - 2))
        return self.pull(batch.maps, log_ratio[each], None if distance is None else distance[each])

    def measure(self, velocity: torch.Tensor, batch: Batch, old: Old | None) -> Seen:
        """Ratios and log-probabilities under a velocity, without a gradient."""
        # With advantages of 0 the kernel only measures.
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
    """An objective whose loss depends on all children of a state together. Masked children, and
    groups whose advantages are all 0, have no pull."""

    compares_children = True

    @abstractmethod
    def group_pull(
        self, advantage: torch.Tensor, log_ratio: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """-dL/d(log ratio) of each child, fp32 [N, B], where L is the loss of its group.

        Args:
            advantage: fp32 [N, B].
            log_ratio: fp32 [N, B].
            valid: bool [N, B]; where it is False the result may be any finite number.
        """

    def batch_pull(self, batch, log_ratio, distance):
        pull = self.group_pull(batch.advantage, log_ratio, batch.valid)
        # A group whose rewards are all equal has no gradient, but a loss of its log-ratios may have
        # one: such a group is forwarded where a penalty acts on it.
        return torch.where(batch.valid & (batch.advantage != 0).any(1, keepdim=True), pull, 0.0)


def _stopped(seen: Seen, batch: Batch, pull: torch.Tensor) -> Seen:
    """Statistics in which a child counts as clipped if its pull is 0 and its advantage is not."""
    # A child without an advantage has no pull either, wherever it moved.
    stopped = (pull == 0) & (batch.advantage != 0)
    # clamp: a state whose children all failed has none to take a share of.
    live, valid = batch.weight != 0, batch.valid.sum(1).clamp(min=1)

    # On the device and without indexing by a mask, which would make the host wait for the GPU.
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
    """`tempflow_kernels.group_loss` of a micro-batch, with the penalty if the kernel computes it.

    Args:
        velocity: [N, ...] of the policy.
        batch: the micro-batch.
        advantage: fp32 [N, B], in place of the batch's own.
        old: outputs of the old policy; None: the policy itself, so the ratio is 1.
        penalty: added if it has a `kernel` form; otherwise ignored.
        velocity_ref: [N, ...] of the policy that the penalty measures from.
        clip_low: the ratio is clipped below at 1 - this.
        clip_high: the ratio is clipped above at 1 + this.
        ratio: "plain" or "guard".
    """
    fused = penalty.kernel if penalty is not None and velocity_ref is not None else None
    coef, form = fused or (0.0, "x")  # without a reference no form is computed
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
        # The op refuses an old velocity under the plain ratio, though a penalty may have kept one.
        velocity_old=None if old is None or ratio == "plain" else old.velocity,
    )
    return loss, Seen(stats.ratio, stats.log_prob, stats.kl, stats.clip_fraction)


def step_distance(
    velocity: torch.Tensor, velocity_old: torch.Tensor | None, batch: Batch
) -> torch.Tensor:
    """KL divergence of the step's Gaussian from the old policy's, b^2 mean((v - v_old)^2) /
    (2 tau^2), fp32 [N, 1]; 0 without an old policy."""
    if velocity_old is None:
        return torch.zeros_like(batch.b)[:, None]
    # The two Gaussians have the same deviation tau, and means that are b (v - v_old) apart: their
    # divergence is the squared distance over 2 tau^2.
    apart = (velocity.detach().float() - velocity_old.float()).flatten(1).square().mean(1)
    return (batch.b.square() * apart / (2 * batch.tau.square()))[:, None]
