"""Suffixes: the steps of a row after its last decision, which may be coarser than the grid.

The last decision of a row is the last step at which it takes noise or rows branch off. The steps
after it only complete the image for the reward; the policy's density does not depend on them.
`benchmarks/suffix_fidelity.py` measures how much rewards change.

A jump of order 2 over several grid points replaces Euler's steps over them, with velocities
v_j = v + (sigma_j - sigma) slope on the line through the last two forwards. The next forward gives
a better slope, and corrects the jump before its own one, like a predictor-corrector method with one
evaluation per step. A jump over one step is Euler's step.
"""

from __future__ import annotations

import torch

from tempflow.config import Suffix
from tempflow.types import Row


def suffix_path(first: int, last: int, suffix: Suffix | None) -> list[int]:
    """The grid points that a suffix visits, from `first` to `last`, both included. `suffix` None
    visits all of them."""
    if suffix is None:
        return list(range(first, last + 1))
    start = min(first + suffix.exact_steps, last)
    # If the stride does not divide the rest, the short jump comes first. With the short jump last,
    # rewards agreed no better with those of the exact suffix (docs/log.md).
    aligned = start + (last - start) % suffix.stride
    return sorted({*range(first, start + 1), *range(aligned, last + 1, suffix.stride)})


def last_decisions(rows: list[Row]) -> list[int]:
    """For each row the last step at which it takes noise, leaves its parent, or rows branch off it.
    Without any of these, the step before its start."""
    # A row with a parent that takes no noise (a value) decides at its start, where it leaves it.
    last = [max(row.noise, default=row.start - (row.parent is None)) for row in rows]
    for row in rows:
        if row.parent is not None:
            last[row.parent] = max(last[row.parent], row.start)
    return last


def count_forwards(rows: list[Row], num_steps: int, suffix: Suffix | None) -> int:
    """The number of row forwards of an integration, without padding. The first step of a child uses
    its parent's forward."""
    return sum(
        len(suffix_path(free, num_steps, suffix)) - 1 + free - first_forward(row)
        for row, free in zip(rows, (k + 1 for k in last_decisions(rows)), strict=True)
    )


def first_forward(row: Row) -> int:
    """The step of a row's first forward: its start, or for a child the step after it, since the
    parent's forward serves its first step."""
    return row.start + (row.parent is not None)


def second_order_gain(sigmas: torch.Tensor, step: int, goal: int) -> float:
    """The effect of a slope of 1 on a jump from `step` to `goal`: the sum over the grid's steps in
    between of dt_j (sigma_j - sigma_step). It is 0 for a single step.

    Args:
        sigmas: the grid, [T + 1].
        step: where the jump begins.
        goal: where it ends.
    """
    points = sigmas[step : goal + 1].double()
    return torch.dot(torch.diff(points), points[:-1] - points[0]).item()
