"""The part of a row after its last decision: it only makes the image whose reward is read, so it
may be coarser.

A jump of order 2 over several grid points stands for Euler's steps over them, with velocities v_j =
v + (sigma_j - sigma) slope on the line through the last two forwards. The next forward shows where
the line should have led: it puts the jump right before it starts its own, as a predictor-corrector
that evaluates once a step does. A jump of one step is Euler's. The policy's density does not depend
on any of it; the reward does, and `benchmarks/suffix_fidelity.py` measures by how much.
"""

from __future__ import annotations

import torch

from tempflow.config import Suffix
from tempflow.types import Row


def suffix_path(first: int, last: int, suffix: Suffix | None) -> list[int]:
    """Grid points from `first` to `last`, both included. Where the stride does not fit, the short
    step comes first."""
    if suffix is None:
        return list(range(first, last + 1))
    start = min(first + suffix.exact_steps, last)
    aligned = start + (last - start) % suffix.stride
    return sorted({*range(first, start + 1), *range(aligned, last + 1, suffix.stride)})


def last_decisions(rows: list[Row]) -> list[int]:
    """For every row the last step at which it takes noise, branches off or is branched off from;
    where there is none, the step before it begins."""
    last = [max(row.noise, default=row.start - (row.parent is None)) for row in rows]
    for row in rows:
        if row.parent is not None:
            last[row.parent] = max(last[row.parent], row.start)
    return last


def count_forwards(rows: list[Row], num_steps: int, suffix: Suffix | None) -> int:
    """How many times a row goes through the transformer, all rows together; a child's first step is
    its parent's forward."""
    return sum(
        len(suffix_path(free, num_steps, suffix)) - 1 + free - first_forward(row)
        for row, free in zip(rows, (k + 1 for k in last_decisions(rows)), strict=True)
    )


def first_forward(row: Row) -> int:
    """The step of a row's first forward; a child's own begin after the step that its parent took
    for it."""
    return row.start + (row.parent is not None)


def second_order_gain(sigmas: torch.Tensor, step: int, goal: int) -> float:
    """sum_j dt_j (sigma_j - sigma_step) over the grid's steps from `step` to `goal`: what a
    velocity that changes by 1 per sigma adds to Euler's steps there. 0 for one step."""
    points = sigmas[step : goal + 1].double()
    return torch.dot(torch.diff(points), points[:-1] - points[0]).item()
