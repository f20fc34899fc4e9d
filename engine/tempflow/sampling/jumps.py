"""Memory of a suffix of order 2: the last jump of every row, from which the slope of the velocity
between two forwards is known. The formula is in `suffix`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tempflow.sampling.suffix import second_order_gain


@dataclass(frozen=True)
class _Jump:
    """The last jump of a row."""

    step: int
    """Where it began."""
    velocity: torch.Tensor
    """The velocity where it began, fp32 [...]."""
    extrapolated: torch.Tensor
    """What the slope of the velocity added to the jump, fp32 [...]."""


class Jumps:
    """The last jumps of rows, by their place in the forest.

    Args:
        sigmas: the grid, fp32 [T + 1] on the CPU.
        free: for each row, the first step after its last decision.
    """

    def __init__(self, sigmas: torch.Tensor, free: list[int]):
        self._sigmas, self._free, self._last = sigmas, free, len(sigmas) - 1
        self._jumps: dict[int, _Jump] = {}

    def bends(self, batch: list[int], steps: list[int], goals: list[int]) -> torch.Tensor:
        """The factor of the difference between each row's velocity now and before, as
        `Denoise.step` adds it: fp32 [n] on the CPU, 0 for a row without a jump before."""
        bends = torch.zeros(len(batch))
        for n, (i, step, goal) in enumerate(zip(batch, steps, goals, strict=True)):
            if i in self._jumps:
                before = self._jumps[i].step
                # The gain of the last jump too: its slope is known only now, and `before` takes
                # back what was added in its place.
                both = self._gain(before, step) + self._gain(step, goal)
                bends[n] = both / self._gap(before, step) / self._gap(step, goal)
        return bends

    def before(self, batch: list[int], x: torch.Tensor) -> dict[str, torch.Tensor]:
        """For each row its velocity at the last jump, and what the last jump had extrapolated. The
        latter is taken back, because the new slope covers both jumps. Shaped like x [n, ...]; 0 for
        a row without a jump before."""
        velocities, extrapolated = torch.zeros_like(x), torch.zeros_like(x)
        for n, i in enumerate(batch):
            if i in self._jumps:
                jump = self._jumps[i]
                velocities[n], extrapolated[n] = jump.velocity, jump.extrapolated
        return {"v_before": velocities, "extrapolated": extrapolated}

    def remember(
        self, batch: list[int], steps: list[int], goals: list[int], v: torch.Tensor
    ) -> None:
        """Keep the jumps of a batch, with velocities v [n, ...]."""
        for n, (i, step, goal) in enumerate(zip(batch, steps, goals, strict=True)):
            before = self._jumps.pop(i, None)
            # The noise of a stochastic step moves the latent off the line between two forwards, so
            # a velocity from before the last decision gives no slope. After the last jump there is
            # no step that would use it.
            if self._free[i] > step or goal == self._last:
                continue
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
