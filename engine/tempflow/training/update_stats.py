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
        self._sums: torch.Tensor | None = None  # float64 [SUMS]
        self._deviation: torch.Tensor | None = None  # float64 [], NaN stays
        self._range: torch.Tensor | None = None  # float64 [2]: least and minus the greatest ratio
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
            self._bound(ratio)
            if first and batch.log_prob_rollout is not None:
                gap = (seen.log_prob - batch.log_prob_rollout)[:real].abs().mean()
                self._compared += real
        means = torch.stack([value.double() for value in (seen.kl, clipped, above, gap)])
        sums = torch.cat([loss.detach().double()[None], means * real])
        self._sums = sums if self._sums is None else self._sums + sums

    def _above(self, seen: Seen, real: int) -> torch.Tensor:
        if seen.clipped_above is not None:
            return seen.clipped_above
        return (seen.ratio[:real] > 1 + self._clip_high).to(seen.clip_fraction.dtype).mean()

    def _bound(self, ratio: torch.Tensor) -> None:
        deviation = (ratio - 1).abs().max().double()
        ends = torch.stack([ratio.min(), -ratio.max()]).double()
        if self._deviation is None:
            self._deviation = torch.zeros_like(deviation)
            self._range = torch.full_like(ends, math.inf)
        self._deviation = torch.maximum(deviation, self._deviation)
        self._range = torch.where(ends < self._range, ends, self._range)  # NaN is no end

    def _read(self) -> list[float]:
        """The sums, the deviation and the range, by one copy to the host."""
        none = torch.tensor([0.0, math.inf, math.inf], dtype=torch.float64)
        bounds = none.to(self._sums.device) if self._range is None else self._bounds()
        finite = [mask.double() for _, mask in self._finite]
        values = torch.cat([self._sums, bounds, *finite]).tolist()
        count = len(SUMS) + len(bounds)
        units = [unit for units, _ in self._finite for unit in units]
        self.broken = [unit for unit, good in zip(units, values[count:], strict=True) if not good]
        return values[:count]

    def _bounds(self) -> torch.Tensor:
        return torch.cat([self._deviation[None], self._range])

    def reduced(self) -> dict[str, float]:
        """The metrics (a collective), after at least one `add`; the one place that waits."""
        *sums, deviation, least, most = self._read()
        sums = distributed.reduce([*sums, self.states, self._compared, self.forwards])
        loss, kl, clipped, above, mismatch, states, compared, forwards = sums
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
