"""The metrics of one optimizer step.

Sums are accumulated on the device, in float64 and in the order of the micro-batches. They are read
once, after the last backward was launched, because a read makes the host wait for the GPU.
"""

from __future__ import annotations

import math

import torch

from tempflow.objectives import Batch, Seen
from tempflow.training import distributed
from tempflow.types import Unit

SUMS = ("loss", "kl", "clipped", "above", "mismatch")


class UpdateStats:
    """Sums of one optimizer step over this rank's micro-batches. `reduced` returns the means over
    all ranks.

    Args:
        clip_high: a child with a ratio above 1 + this counts as clipped above, unless the objective
            reports `clipped_above` itself.
    """

    def __init__(self, clip_high: float):
        self._clip_high = clip_high
        self.states = self.forwards = 0
        self._compared = 0  # number of states in the sum of `mismatch`
        self._sums: list[torch.Tensor] = []  # float64 [SUMS] of each micro-batch
        # float64 [3] of each micro-batch: the largest deviation of a ratio from 1, the smallest
        # ratio, and minus the largest ratio, so that one `amin` finds the last two.
        self._ratios: list[torch.Tensor] = []
        self._finite: list[tuple[list[Unit], torch.Tensor]] = []  # units, and bool [real]
        self.broken: list[Unit] = []
        """Units whose log-probabilities are not finite; filled by `reduced`."""

    @torch.no_grad()
    def add(self, batch: Batch, seen: Seen, loss: torch.Tensor, first: bool) -> None:
        """Add a micro-batch.

        Args:
            batch: the micro-batch.
            seen: its statistics.
            loss: fp32 [], its share of the loss.
            first: whether the weights are still those of the rollout, so that log-probabilities can
                be compared with the rollout's.
        """
        # Padding comes last and is left out by slicing, which needs no mask on the device.
        real, zero = batch.real, torch.zeros_like(seen.kl)
        self.forwards += real
        self.states += real
        self._finite.append((batch.units[:real], seen.log_prob.isfinite().all(1)[:real]))
        clipped = above = gap = zero
        if real:
            ratio, clipped, above = seen.ratio[:real], seen.clip_fraction, self._above(seen, real)
            ends = [(ratio - 1).abs().max(), ratio.min(), -ratio.max()]
            self._ratios.append(torch.stack(ends).double())
            if first and batch.log_prob_rollout is not None:
                gap = (seen.log_prob - batch.log_prob_rollout)[:real].abs().mean()
                self._compared += real
        # Means times counts: the last micro-batch may have fewer states than the others.
        means = torch.stack([value.double() for value in (seen.kl, clipped, above, gap)])
        self._sums.append(torch.cat([loss.detach().double()[None], means * real]))

    def _above(self, seen: Seen, real: int) -> torch.Tensor:
        """The share of children that count as clipped above, fp32 []."""
        if seen.clipped_above is not None:
            return seen.clipped_above
        return (seen.ratio[:real] > 1 + self._clip_high).to(seen.clip_fraction.dtype).mean()

    def _read(self) -> list[float]:
        """The sums and the bounds of the ratios, in one copy to the host; sets `broken`."""
        finite = [mask.double() for _, mask in self._finite]
        # Python's sum adds from left to right, in the order of the micro-batches.
        sums, bounds = sum(self._sums[1:], self._sums[0]), self._bounds()
        values = torch.cat([sums, *bounds, *finite]).tolist()
        units = [unit for units, _ in self._finite for unit in units]
        known = values[len(values) - len(units) :]
        self.broken = [unit for unit, good in zip(units, known, strict=True) if not good]
        # Without a ratio on this rank: values that change no maximum or minimum over ranks.
        return values[: len(SUMS)] + (
            values[len(SUMS) :][:3] if bounds else [0.0, math.inf, math.inf]
        )

    def _bounds(self) -> list[torch.Tensor]:
        """The largest deviation from 1, the smallest and the negated largest of all ratios, [1]
        each; none if there is no ratio."""
        if not self._ratios:
            return []
        deviation, *ends = torch.stack(self._ratios).unbind(1)
        # A NaN ratio must show in the deviation, but the ends are those of the other ratios.
        return [
            deviation.max()[None],
            *(one.nan_to_num(math.inf, math.inf, -math.inf).amin()[None] for one in ends),
        ]

    def reduced(self) -> dict[str, float]:
        """The metrics, after at least one `add` (a collective). Only here the host waits."""
        *sums, deviation, least, most = self._read()
        totals = distributed.reduce([*sums, self.states, self._compared, self.forwards])
        loss, kl, clipped, above, mismatch, states, compared, forwards = totals
        n = max(states, 1)
        found = {
            "loss": float(loss),
            "kl": kl / n,
            "clip_fraction": clipped / n,
            "clip_fraction/high": above / n,
            "clip_fraction/low": (clipped - above) / n,
            "ratio/max_dev": float(distributed.reduce(deviation, "max")),
            "ratio/min": float(-distributed.reduce(-least, "max")),
            "ratio/max": float(distributed.reduce(-most, "max")),
            "forwards": int(forwards),
        }
        return found | ({"mismatch/log_prob": mismatch / compared} if compared else {})
