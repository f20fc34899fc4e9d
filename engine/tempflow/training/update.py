"""Optimizer steps over the states of a rollout. The children of a state share one forward and one
backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch

from tempflow.models import Sampler
from tempflow.objectives import Batch, Objective, Old
from tempflow.penalties import Penalty
from tempflow.profiling import span
from tempflow.training.engine import Runtime
from tempflow.training.update_stats import UpdateStats
from tempflow.types import Unit


@dataclass
class Part:
    """The states of one optimizer step, which several passes repeat."""

    batches: list[Batch]
    """This rank's micro-batches."""
    total: int
    """The number of states of all ranks, skipped ones included; the loss is their mean."""
    old: list[Old | None]
    """For each micro-batch the outputs of the policy before the updates; None until known."""
    reference: list[torch.Tensor | None]
    """For each micro-batch the reference policy's velocities [N, ...]; None until computed, or if
    no penalty needs them."""

    @classmethod
    def of(cls, batches: list[Batch], total: int) -> Part:
        """A part before its first forward."""
        return cls(batches, total, [None] * len(batches), [None] * len(batches))


class Updater:
    """Turns micro-batches into optimizer steps.

    Args:
        runtime: the training engine.
        sampler: the policy at the run's size and guidance scale.
        objective: the loss.
        penalty: the divergence that is added to it; None: nothing.
        embed: returns the conditioning of units.
    """

    def __init__(
        self,
        runtime: Runtime,
        sampler: Sampler,
        objective: Objective,
        penalty: Penalty | None,
        embed: Callable[[list[Unit]], dict[str, torch.Tensor]],
    ):
        self.runtime, self.sampler, self.objective, self.embed = runtime, sampler, objective, embed
        self.penalty: Any = penalty  # Any, because code that reads its fields is not run with None

    def velocity(self, transformer, batch: Batch) -> torch.Tensor:
        """The transformer's velocities at a batch's states, [N, ...] in the training dtype."""
        policy = self.sampler.policy
        denoiser = policy.only(transformer, [policy.expert(sigma) for sigma in batch.sigmas])
        return self.sampler.velocity(
            denoiser, batch.x, batch.sigma, self.embed(batch.units), dtype=self.runtime.dtype
        )

    def update(self, part: Part, lr_factor: float, advance=lambda n: None) -> dict:
        """One optimizer step over all micro-batches of a part (a collective).

        If the part's old policy is not known yet, the weights must still be those of the rollout:
        this forward then defines it, and the ratio is exactly 1.

        Args:
            part: the states; its `old` and `reference` are filled in.
            lr_factor: factor of the learning rate.
            advance: is called with 1 after each micro-batch.

        Returns:
            Metrics. If the gradient was not finite nothing changes on any rank, "skipped" is 1, and
            "broken" lists this rank's units whose log-probabilities are not finite.
        """
        stats = UpdateStats(self.objective.clip_high)
        for i, batch in enumerate(part.batches):
            with span("train micro-batch", states=len(batch.x)):
                loss = self._loss(part, i, stats)
                self.runtime.accumulate(loss, last=i == len(part.batches) - 1)
            advance(1)
        # Read once, after the last backward was launched: a read in the loop would make the host
        # wait for every micro-batch.
        metrics = stats.reduced()
        with span("optimizer step"):
            norm = self.runtime.step(lr_factor)
        return metrics | {
            "grad_norm": math.nan if norm is None else norm,
            "skipped": int(norm is None),
            "broken": stats.broken,
        }

    def _loss(self, part: Part, i: int, stats: UpdateStats) -> torch.Tensor:
        """This rank's share of the loss from micro-batch i, fp32 []; fills in `old` and
        `reference`."""
        batch, old = part.batches[i], part.old[i]
        # Once per rollout: the reference policy does not change between passes.
        if self.penalty and self.penalty.needs_reference and part.reference[i] is None:
            part.reference[i] = self._reference(batch, stats)
        v = self.velocity(self.runtime.engine, batch)
        other = self._held_to(v, old, part.reference[i])
        loss, seen = self.objective.loss(v, batch, old, self.penalty, other)
        if self.penalty and self.penalty.kernel is None:
            loss, seen = self._penalized(loss, seen, v, batch, other)
        if old is None:
            part.old[i] = self._old(v, seen.log_prob)
        # The kernel's loss is a mean over the N places of the micro-batch, padding included. This
        # makes it a share of the mean over all states, whatever the micro-batch size.
        scaled = loss * (len(batch.x) / part.total)
        stats.add(batch, seen, scaled, first=old is None)
        return scaled

    def _held_to(
        self, v: torch.Tensor, old: Old | None, reference: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The velocities of the policy that the penalty measures from, [N, ...], or None."""
        # In the first update the old policy is the current one; detached, so that the difference is
        # 0 and its gradient is taken in one of the two only.
        if not self.penalty or self.penalty.needs_reference:
            return reference
        return v.detach() if old is None else old.velocity

    def _penalized(self, loss, seen, v, batch, other):
        """Add a penalty that the kernel does not compute to the loss and its statistics."""
        # As in the kernel: padding counts in the mean of the loss, but not in that of the metric.
        live = batch.weight != 0
        found = self.penalty.divergence(v, other, batch.b, batch.tau)
        kl = torch.where(live & self._acts_on(batch), found, 0.0)
        return loss + self.penalty.coef * kl.mean(), seen._replace(
            kl=(kl.sum() / live.sum().clamp(min=1)).detach()
        )

    def _acts_on(self, batch: Batch) -> torch.Tensor:
        """Which states are at the penalty's steps, bool [N]."""
        # One comparison with a Python number per step. A tensor of the steps would have to be
        # copied to the GPU, and the host would wait.
        if self.penalty.steps is None:
            return torch.ones_like(batch.weight, dtype=torch.bool)
        acts = torch.zeros_like(batch.weight, dtype=torch.bool)
        for step in self.penalty.steps:
            acts |= batch.step == step
        return acts

    def _old(self, v: torch.Tensor, log_prob: torch.Tensor) -> Old:
        """What later passes need of this forward. Velocities are kept only if something reads
        them: they are as large as the latents."""
        kept = (
            self.objective.keeps_velocity
            or self.penalty is not None
            and not self.penalty.needs_reference
        )
        return Old(log_prob.detach(), v.detach() if kept else None)

    @torch.no_grad()
    def remember(self, part: Part, advance=lambda n: None) -> int:
        """Fill in `old` of a part before any update moves the weights; returns the number of rows
        that this rank forwarded."""
        for i, batch in enumerate(part.batches):
            v = self.velocity(self.runtime.engine, batch)
            part.old[i] = self._old(v, self.objective.measure(v, batch, None).log_prob)
            advance(1)
        return sum(batch.real for batch in part.batches)

    @torch.no_grad()
    def _reference(self, batch: Batch, stats: UpdateStats) -> torch.Tensor:
        """The reference policy's velocities at a batch's states, [N, ...]."""
        stats.forwards += batch.real
        with self.runtime.reference_transformer() as transformer:
            return self.velocity(transformer, batch)

    @torch.no_grad()
    def replay_deviation(self, batch: Batch) -> float:
        """The largest |ratio - 1| between two forwards of the same states with the same weights; 0
        if forwards are deterministic."""
        passes = []
        for _ in range(2):
            v = self.velocity(self.runtime.engine, batch)
            passes.append(self.objective.measure(v, batch, None).log_prob)
        # expm1 in float64: the ratios differ from 1 by less than fp32 can resolve near 1.
        return float(np.abs(np.expm1((passes[1] - passes[0]).double().cpu().numpy())).max())
