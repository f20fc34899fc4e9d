"""What a second-order suffix remembers of the rows under way: each step bends by the slope of the
velocity between two forwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tempflow.sampling.suffix import second_order_gain


@dataclass(frozen=True)
class _Jump:
    """A row's last jump."""

    step: int
    velocity: torch.Tensor
    """fp32 [...], where the jump began."""
    extrapolated: torch.Tensor
    """fp32 [...], what the velocity's slope added to it."""


class Jumps:
    """The last jumps of rows, by their place in the forest.

    sigmas: fp32 [T + 1], on the CPU. free: the step from which on each row has no decision ahead.
    """

    def __init__(self, sigmas: torch.Tensor, free: list[int]):
        self._sigmas, self._free, self._last = sigmas, free, len(sigmas) - 1
        self._jumps: dict[int, _Jump] = {}

    def bends(self, batch: list[int], steps: list[int], goals: list[int]) -> torch.Tensor:
        """How much each row's step bends by the difference to its velocity before, fp32 [n] on the
        CPU."""
        bends = torch.zeros(len(batch))
        for n, (i, step, goal) in enumerate(zip(batch, steps, goals, strict=True)):
            if i in self._jumps:
                before = self._jumps[i].step
                both = self._gain(before, step) + self._gain(step, goal)
                bends[n] = both / self._gap(before, step) / self._gap(step, goal)
        return bends

    def before(self, batch: list[int], x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each row's velocity before, and what of the last jump is taken back, because the new
        slope covers both jumps; [n, ...] like x."""
        velocities, extrapolated = torch.zeros_like(x), torch.zeros_like(x)
        for n, i in enumerate(batch):
            if i in self._jumps:
                jump = self._jumps[i]
                velocities[n], extrapolated[n] = jump.velocity, jump.extrapolated
        return {"v_before": velocities, "extrapolated": extrapolated}

    def remember(
        self, batch: list[int], steps: list[int], goals: list[int], v: torch.Tensor
    ) -> None:
        """Note the jumps of a batch, whose velocities are v [n, ...]."""
        for n, (i, step, goal) in enumerate(zip(batch, steps, goals, strict=True)):
            before = self._jumps.pop(i, None)
            if self._free[i] > step or goal == self._last:
                continue  # a velocity from before the last noise misleads
            now = v[n].float()
            part = torch.zeros_like(now)
            if before is not None:
                gain = self._gain(step, goal) / self._gap(before.step, step)
                part = gain * (now - before.velocity)
            self._jumps[i] = _Jump(step, now, part)

    def _gain(self, step: int, goal: int) -> float:
        return second_order_gain(self._sigmas, step, goal)

    def _gap(self, step: int, goal: int) -> float:
        return (self._sigmas[goal] - self._sigmas[step]).item()
