"""Passes over one rollout's states: one forward and one backward per state, shared by its
children."""

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
    """A share of the states that makes one optimizer step.

    batches stay as they are; old and reference, one place for each of them, are filled as they
    become known: what the policy before the updates said, and the reference policy's velocities [N,
    ...] where a penalty needs them.
    """

    batches: list[Batch]
    total: int
    """States of all ranks, skipped ones included: what the loss is the mean over."""
    old: list[Old | None]
    reference: list[torch.Tensor | None]

    @classmethod
    def of(cls, batches: list[Batch], total: int) -> Part:
        """A share that nothing is known of yet."""
        return cls(batches, total, [None] * len(batches), [None] * len(batches))


class Updater:
    """Turns micro-batches into optimizer steps.

    Args:
        runtime: the engine around the trained transformer.
        sampler: the policy at the run's size and guidance scale.
        objective: what is minimized.
        penalty: what holds the policy to another; None: nothing.
        embed: gives the conditioning of units.
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
        self.penalty: Any = penalty  # None: what reads its fields is not called

    def velocity(self, transformer, batch: Batch) -> torch.Tensor:
        """v of a batch's states, [N, ...] in the training dtype."""
        return self.sampler.velocity(
            transformer, batch.x, batch.sigma, self.embed(batch.units), dtype=self.runtime.dtype
        )

    def update(self, part: Part, lr_factor: float, advance=lambda n: None) -> dict:
        """One optimizer step over all micro-batches of a part; returns metrics.

        Where the old policy is not known yet, the weights must still be those of the rollout: then
        this forward defines it, and the ratio is exactly 1. A gradient that is not finite changes
        nothing on any rank: then `skipped` is 1, and `broken` holds this rank's units whose
        log-probabilities are not finite.
        """
        stats = UpdateStats(self.objective.clip_high)
        for i, batch in enumerate(part.batches):
            with span("train micro-batch", states=len(batch.x)):
                loss = self._loss(part, i, stats)
                self.runtime.accumulate(loss, last=i == len(part.batches) - 1)
            advance(1)
        metrics = stats.reduced()
        with span("optimizer step"):
            norm = self.runtime.step(lr_factor)
        return metrics | {
            "grad_norm": math.nan if norm is None else norm,
            "skipped": int(norm is None),
            "broken": stats.broken,
        }

    def _loss(self, part: Part, i: int, stats: UpdateStats) -> torch.Tensor:
        batch, old = part.batches[i], part.old[i]
        if self.penalty and self.penalty.needs_reference and part.reference[i] is None:
            part.reference[i] = self._reference(batch, stats)
        v = self.velocity(self.runtime.engine, batch)
        other = self._held_to(v, old, part.reference[i])
        loss, seen = self.objective.loss(v, batch, old, self.penalty, other)
        if self.penalty and self.penalty.kernel is None:
            loss, seen = self._penalized(loss, seen, v, batch, other)
        if old is None:
            part.old[i] = self._old(v, seen.log_prob)
        scaled = loss * (len(batch.x) / part.total)
        stats.add(batch, seen, scaled, first=old is None)
        return scaled

    def _held_to(
        self, v: torch.Tensor, old: Old | None, reference: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The velocities that a penalty compares with. In the first update the old policy's are
        these themselves."""
        if not self.penalty or self.penalty.needs_reference:
            return reference
        return v.detach() if old is None else old.velocity

    def _penalized(self, loss, seen, v, batch, other):
        live = batch.weight != 0
        found = self.penalty.divergence(v, other, batch.b, batch.tau)
        kl = torch.where(live & self._acts_on(batch), found, 0.0)
        return loss + self.penalty.coef * kl.mean(), seen._replace(
            kl=(kl.sum() / live.sum().clamp(min=1)).detach()
        )

    def _acts_on(self, batch: Batch) -> torch.Tensor:
        """bool [N]: states at the penalty's steps. Step by step, since a list of them would be
        copied to the GPU."""
        if self.penalty.steps is None:
            return torch.ones_like(batch.weight, dtype=torch.bool)
        acts = torch.zeros_like(batch.weight, dtype=torch.bool)
        for step in self.penalty.steps:
            acts |= batch.step == step
        return acts

    def _old(self, v: torch.Tensor, log_prob: torch.Tensor) -> Old:
        kept = (
            self.objective.keeps_velocity
            or self.penalty is not None
            and not self.penalty.needs_reference
        )
        return Old(log_prob.detach(), v.detach() if kept else None)

    @torch.no_grad()
    def remember(self, part: Part, advance=lambda n: None) -> int:
        """Note what the policy says of a part before any update moves it; returns this rank's
        forwards."""
        for i, batch in enumerate(part.batches):
            v = self.velocity(self.runtime.engine, batch)
            part.old[i] = self._old(v, self.objective.measure(v, batch, None).log_prob)
            advance(1)
        return sum(batch.real for batch in part.batches)

    @torch.no_grad()
    def _reference(self, batch: Batch, stats: UpdateStats) -> torch.Tensor:
        stats.forwards += batch.real
        with self.runtime.reference_transformer() as transformer:
            return self.velocity(transformer, batch)

    @torch.no_grad()
    def replay_deviation(self, batch: Batch) -> float:
        """Largest |ratio - 1| of a second pass over the same states with the same weights; 0 where
        training is exact."""
        passes = []
        for _ in range(2):
            v = self.velocity(self.runtime.engine, batch)
            passes.append(self.objective.measure(v, batch, None).log_prob)
        return float(np.abs(np.expm1((passes[1] - passes[0]).double().cpu().numpy())).max())
