"""What one optimizer step reports of itself.

Sums are added up on the device, in float64 and in the order of the micro-batches, and read once
when the last backward has been launched: a read before would make the host wait for every
micro-batch.
"""

from __future__ import annotations

import math

import torch

from tempflow.objectives import Batch, Seen
from tempflow.training import distributed
from tempflow.types import Unit

SUMS = ("loss", "kl", "clipped", "above", "mismatch")


class UpdateStats:
    """Sums of one optimizer step over this rank's micro-batches; `reduced` gives the means over all
    ranks.

    clip_high: above a ratio of 1 + this a child counts as clipped above, where the objective does
    not say itself.
    """

    def __init__(self, clip_high: float):
        self._clip_high = clip_high
        self.states = self.forwards = 0
        self._compared = 0  # states that `mismatch` is the sum over
        self._sums: list[torch.Tensor] = []  # float64 [SUMS] of each micro-batch
        # float64 [3] each: the largest deviation of a ratio from 1, the least, minus the greatest
        self._ratios: list[torch.Tensor] = []
        self._finite: list[tuple[list[Unit], torch.Tensor]] = []  # with bool [real]
        self.broken: list[Unit] = []
        """After `reduced`: units whose log-probabilities are not finite."""

    @torch.no_grad()
    def add(self, batch: Batch, seen: Seen, loss: torch.Tensor, first: bool) -> None:
        """Note a micro-batch. first: whether its ratios are of the policy to itself, so that its
        log-probabilities can be compared with the rollout's."""
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
        means = torch.stack([value.double() for value in (seen.kl, clipped, above, gap)])
        self._sums.append(torch.cat([loss.detach().double()[None], means * real]))

    def _above(self, seen: Seen, real: int) -> torch.Tensor:
        if seen.clipped_above is not None:
            return seen.clipped_above
        return (seen.ratio[:real] > 1 + self._clip_high).to(seen.clip_fraction.dtype).mean()

    def _read(self) -> list[float]:
        """The sums, and the bounds of the ratios, by one copy to the host."""
        finite = [mask.double() for _, mask in self._finite]
        sums, bounds = sum(self._sums[1:], self._sums[0]), self._bounds()
        values = torch.cat([sums, *bounds, *finite]).tolist()
        units = [unit for units, _ in self._finite for unit in units]
        known = values[len(values) - len(units) :]
        self.broken = [unit for unit, good in zip(units, known, strict=True) if not good]
        return values[: len(SUMS)] + (
            values[len(SUMS) :][:3] if bounds else [0.0, math.inf, math.inf]
        )

    def _bounds(self) -> list[torch.Tensor]:
        """Of all ratios, where there is one: the deviation, in which a NaN stays, and the ends, of
        which it is none."""
        if not self._ratios:
            return []
        deviation, *ends = torch.stack(self._ratios).unbind(1)
        return [
            deviation.max()[None],
            *(one.nan_to_num(math.inf, math.inf, -math.inf).amin()[None] for one in ends),
        ]

    def reduced(self) -> dict[str, float]:
        """The metrics (a collective), after at least one `add`; the one place that waits."""
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
