"""Updates on one rollout's decisions: one forward and one backward per state, shared by its children."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from tempflow.config import Config
from tempflow.profiling import span
from tempflow.sampling.plans import Unit
from tempflow.training import distributed as comm
from tempflow.training.batches import Batch, one_child_per_state
from tempflow.training.engine import Runtime
from tempflow.types import Size
from tempflow_kernels import group_loss


@dataclass
class UpdateStats:
    """Sums of one optimizer step over this rank's micro-batches; `reduced` gives the means over all ranks."""

    loss: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    above: float = 0.0  # of `clipped`, with a ratio above the range; the others lie below it
    decisions: int = 0
    forwards: int = 0
    mismatch: float = 0.0
    max_dev: float = 0.0
    ratio_range: list[float] = field(default_factory=lambda: [math.inf, -math.inf])
    broken: list[Unit] = field(default_factory=list)  # whose log-probabilities are not finite

    def reduced(self) -> dict[str, float]:
        sums = comm.reduce([self.loss, self.kl, self.clipped, self.above, self.decisions, self.mismatch, self.forwards])
        loss, kl, clipped, above, decisions, mismatch, forwards = sums
        least, most = -comm.reduce(-self.ratio_range[0], "max"), comm.reduce(self.ratio_range[1], "max")
        n = max(decisions, 1)
        return {
            "loss": float(loss), "kl": kl / n, "clip_fraction": clipped / n, "clip_fraction/high": above / n,
            "clip_fraction/low": (clipped - above) / n, "mismatch/log_prob": mismatch / n,
            "ratio/max_dev": float(comm.reduce(self.max_dev, "max")), "ratio/min": float(least),
            "ratio/max": float(most), "forwards": int(forwards),
        }  # fmt: skip


class Updater:
    """Turns micro-batches into optimizer steps. embed(units) gives the conditioning of a batch's units.

    share_forward: one forward per state; False: one per child, which benchmarks compare with.
    """

    def __init__(self, config: Config, runtime: Runtime, embed, share_forward: bool = True):
        self.config, self.runtime, self.embed, self.share_forward = config, runtime, embed, share_forward
        self.objective, self.penalty = config.objective(), config.penalty()

    def velocity(self, transformer, batch: Batch) -> torch.Tensor:
        r = self.config.rollout
        sampler = self.runtime.policy.at(Size(r.height, r.width), r.guidance_scale)
        return sampler.velocity(transformer, batch.x, batch.sigma, self.embed(batch.units), self.runtime.dtype)

    def update(self, batches: list[Batch], total: int, lr_factor: float, first: bool, advance=lambda n: None) -> dict:
        """One optimizer step over all micro-batches; returns metrics.

        A gradient that is not finite changes nothing on any rank: then `skipped` is 1, and `broken` holds this rank's units
        whose log-probabilities are not finite.
        total: decisions of all ranks, skipped ones included: what the loss is the mean over. first: the weights are
        still those of the rollout, so this forward defines the old policy, and its ratio is exactly 1.
        """
        stats = UpdateStats()
        for i, batch in enumerate(batches):
            with span("train micro-batch", states=len(batch.x)):
                loss = self._loss(batch, total, first, stats)
                self.runtime.accumulate(loss, last=i == len(batches) - 1)
            advance(1)
        metrics = stats.reduced()
        with span("optimizer step"):
            norm = self.runtime.step(lr_factor)
        return metrics | {"grad_norm": math.nan if norm is None else norm, "skipped": int(norm is None), "broken": stats.broken}

    def _loss(self, batch: Batch, total: int, first: bool, stats: UpdateStats) -> torch.Tensor:
        objective, penalty = self.objective, self.penalty
        used = batch if self.share_forward else one_child_per_state(batch)
        if penalty and used.velocity_ref is None:
            used.velocity_ref = self._reference(used, stats)
            batch.velocity_ref = used.velocity_ref[:: len(used.x) // len(batch.x)]
        v = self.velocity(self.runtime.engine, used)
        loss, seen = group_loss(
            v, used.x, used.x_next, used.a, used.b, used.tau, None if first else used.log_prob_old, used.advantage,
            used.weight, clip_low=objective.clip_low, clip_high=objective.clip_high, velocity_ref=used.velocity_ref,
            kl_coef=penalty.coef if penalty else 0.0, kl_form=penalty.form if penalty else "x", ratio=objective.ratio,
            velocity_old=None if first else used.velocity_old,
        )  # fmt: skip
        if first:
            batch.log_prob_old = seen.log_prob.reshape(batch.advantage.shape)
            if objective.ratio == "guard":
                batch.velocity_old = v.detach()[:: len(v) // len(batch.x)]
        rows = len(batch.x)
        self._note(batch, used, seen, first, stats)
        scaled = loss * (rows / total)
        stats.loss += scaled.item()
        return scaled

    @torch.no_grad()
    def _reference(self, batch: Batch, stats: UpdateStats) -> torch.Tensor:
        stats.forwards += batch.real
        with self.runtime.reference_transformer() as transformer:
            return self.velocity(transformer, batch)

    def _note(self, batch: Batch, used: Batch, seen, first: bool, stats: UpdateStats) -> None:
        stats.forwards += used.real
        stats.decisions += batch.real
        stats.kl += seen.kl.item() * batch.real
        finite = seen.log_prob.isfinite().all(1)[: used.real].tolist()
        stats.broken += [unit for unit, good in zip(used.units, finite) if not good]
        ratio = seen.ratio[: used.real]
        if used.real:
            above = (ratio > 1 + self.objective.clip_high).to(seen.clip_fraction.dtype).mean()
            clipped, above = torch.stack([seen.clip_fraction, above]).tolist()
            stats.clipped, stats.above = stats.clipped + clipped * batch.real, stats.above + above * batch.real
            stats.max_dev = max(stats.max_dev, (ratio - 1).abs().max().item())
            stats.ratio_range = [min(stats.ratio_range[0], ratio.min().item()), max(stats.ratio_range[1], ratio.max().item())]
        if first and used.real:
            gap = (seen.log_prob - used.log_prob_rollout)[: used.real].abs().mean().item()
            stats.mismatch += gap * batch.real

    @torch.no_grad()
    def replay_deviation(self, batch: Batch) -> float:
        """Largest |ratio - 1| of a second pass over the same states with the same weights; 0 where training is exact."""
        passes = []
        for _ in range(2):
            v = self.velocity(self.runtime.engine, batch)
            passes.append(self._log_prob(v, batch))
        return float(np.abs(np.expm1((passes[1] - passes[0]).double().cpu().numpy())).max())

    def _log_prob(self, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        zero = torch.zeros_like(batch.advantage)
        return group_loss(v, batch.x, batch.x_next, batch.a, batch.b, batch.tau, None, zero, batch.weight,
                          clip_low=0.0, clip_high=0.0)[1].log_prob  # fmt: skip
