"""Numbers the rows, states and slots of an iteration in the same way on every rank, so that ranks
agree without communication.

A plan makes the rows of one unit (prompt, seed) at a time. Here they get states and slots, and the
units that are integrated together become a forest in which parents come before their children.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tempflow.types import Row, Slots, Unit

ENDPOINT = -1  # the step of slots that are endpoints and belong to no state


def iteration_units(prompt_ids: list[int], seeds: int) -> list[Unit]:
    """All units of an iteration in order: prompt by prompt, and all seeds of a prompt together."""
    return [
        Unit(p * seeds + s, p, prompt_id, s)
        for p, prompt_id in enumerate(prompt_ids)
        for s in range(seeds)
    ]


@dataclass(frozen=True)
class Forest:
    """Rows that are integrated together."""

    rows: list[Row]
    """Parents before their children; `Row.parent` is a place in this list."""
    numbers: list[int]
    """The number of each row among the rows of all units."""
    slots: dict[tuple[int, int], np.ndarray]
    """The slots of the children of each state, int [B], by (place of the row, step); empty if slots
    are endpoints."""

    @cached_property
    def depth(self) -> list[int]:
        """The number of branches between the initial noise and each row."""
        found: list[int] = []
        # In one pass, because parents come first.
        for row in self.rows:
            found.append(0 if row.parent is None else found[row.parent] + 1)
        return found

    @cached_property
    def branches(self) -> dict[tuple[int, int], list[int]]:
        """The places of the rows that branch off, by (place of their parent, step)."""
        found = defaultdict(list)
        for n, row in enumerate(self.rows):
            if row.parent is not None:
                found[row.parent, row.start].append(n)
        return dict(found)


class Layout:
    """The rows of all units of an iteration, and the slots of their states or endpoints.

    `first`, int [units + 1], is the number of each unit's first row among the rows of all units;
    `slots` has one line for each slot.

    Args:
        units: the units of all ranks, in order.
        rows: the rows of each unit, parents before children, as `Plan.rows` makes them.
        endpoints: make every row a slot, for objectives that learn from finished latents. By
            default every child of a state is one.
    """

    def __init__(self, units: list[Unit], rows: list[list[Row]], endpoints: bool = False):
        self.units, self.rows = units, rows
        self.first = np.cumsum([0, *map(len, rows)])
        self._slots: dict[tuple[int, int, int], np.ndarray] = {}
        self.slots = self._endpoint_slots() if endpoints else self._state_slots()

    def __len__(self) -> int:
        """The number of rows of all units."""
        return int(self.first[-1])

    @cached_property
    def without_slot(self) -> np.ndarray:
        """Numbers of the rows whose reward belongs to no slot and is no state's value, such as
        trunks, int [rows]."""
        values = np.flatnonzero([row.value for unit in self.rows for row in unit])
        return np.setdiff1d(
            np.arange(len(self)), [*values, *(row for rows in self.slots.leaves for row in rows)]
        )

    @cached_property
    def completions(self) -> np.ndarray:
        """For each slot the number of the row that its state is on, if that row follows the ODE
        from there on, like a trunk; else -1. int [slots]."""
        found = np.full(len(self.slots), -1)
        # A row with noise at this step or later ends elsewhere than the state's completion.
        for (u, n, step), slots in self._slots.items():
            if not any(k >= step for k in self.rows[u][n].noise):
                found[slots] = self.first[u] + n
        return found

    def forest(self, chosen: list[int]) -> Forest:
        """The rows of some units, which are given as places in `units`: first all roots, then their
        children, and so on; unit by unit within each."""
        lines = [
            (_depth(self.rows[u], n), k, n)
            for k, u in enumerate(chosen)
            for n in range(len(self.rows[u]))
        ]
        # By depth and unit alone, in a stable sort: within a unit the plan's order stays.
        order = [(chosen[k], n) for _, k, n in sorted(lines, key=lambda line: line[:2])]
        place = {key: i for i, key in enumerate(order)}
        rows = [self.rows[u][n] for u, n in order]
        moved = [
            replace(row, parent=None if row.parent is None else place[u, row.parent])
            for row, (u, _) in zip(rows, order)
        ]
        slots = {
            (place[u, n], step): found
            for (u, n, step), found in self._slots.items()
            if (u, n) in place
        }
        return Forest(moved, [int(self.first[u]) + n for u, n in order], slots)

    def _state_slots(self) -> Slots:
        """One slot for each child of each state; fills `_slots` on the way."""
        lines: list[tuple[int, ...]] = []
        leaves: list[tuple[int, ...]] = []
        values: list[list[int]] = []
        states = 0
        # All numbers follow from the order of units, rows and steps, which every rank knows.
        for u, rows in enumerate(self.rows):
            branches = _branches(rows)
            value_rows = {
                (row.parent, row.start): n
                for n, row in enumerate(rows)
                if row.value and row.parent is not None
            }
            for (parent, step), members in states_of(rows).items():
                self._slots[u, parent, step] = np.arange(len(lines), len(lines) + len(members))
                for child, n in enumerate(members):
                    lines.append((rows[n].unit.prompt, rows[n].unit.seed, step, states, child))
                    # Sorted, because the mean of their rewards is a sum in this order.
                    leaves.append(
                        tuple(
                            int(self.first[u]) + leaf
                            for leaf in sorted(_below(rows, branches, n, step))
                        )
                    )
                    pair = (
                        value_rows.get((parent, step)),
                        _value_after(rows, branches, value_rows, n, step),
                    )
                    values.append(
                        [-1 if place is None else int(self.first[u]) + place for place in pair]
                    )
                states += 1
        # None instead of arrays of -1, so that advantages can tell that the plan has no values.
        known = any(row.value for rows in self.rows for row in rows)
        before, after = np.array(values, dtype=np.int64).reshape(-1, 2).T if known else (None, None)
        return Slots(**_columns(lines), leaves=tuple(leaves), before=before, after=after)

    def _endpoint_slots(self) -> Slots:
        rows = [row for unit in self.rows for row in unit]
        # Each endpoint is the only child of a state of its own.
        lines: list[tuple[int, ...]] = [
            (row.unit.prompt, row.unit.seed, ENDPOINT, n, 0) for n, row in enumerate(rows)
        ]
        return Slots(**_columns(lines), leaves=tuple((n,) for n in range(len(rows))))


def states_of(rows: list[Row]) -> dict[tuple[int, int], list[int]]:
    """The states of a unit's rows: the rows that are children of each state, by (row, step), in
    order of step and then of row.

    A row that continues by the SDE is the first child of its own state, and the rows that branch
    off there with noise follow. A row that takes noise at the step where it leaves its parent is a
    child of the parent's state.
    """
    found = defaultdict(list)
    for n, row in enumerate(rows):
        for step in row.noise:
            if row.parent is not None and step == row.start:
                found[row.parent, step].append(n)
            else:
                found[n, step].insert(0, n)
    return {key: found[key] for key in sorted(found, key=lambda key: (key[1], key[0]))}


def _columns(lines: list[tuple[int, ...]]) -> dict[str, Any]:
    """The columns of `Slots` by name, int64 [n], from n lines (prompt, seed, step, state,
    child)."""
    # The reshape gives five columns also without lines.
    columns = np.array(lines, dtype=np.int64).reshape(-1, 5).T
    return dict(zip(("prompt", "seed", "step", "state", "child"), columns, strict=True))


def _depth(rows: list[Row], n: int) -> int:
    parent = rows[n].parent
    return 0 if parent is None else _depth(rows, parent) + 1


def _branches(rows: list[Row]) -> dict[int, list[int]]:
    """The rows that branch off each row, at any step."""
    found = defaultdict(list)
    for n, row in enumerate(rows):
        if row.parent is not None:
            found[row.parent].append(n)
    return found


def _below(rows: list[Row], branches: dict[int, list[int]], n: int, step: int) -> list[int]:
    """The rows that contain row n's latent after `step`: row n itself, all rows that branch off it
    later, and all that branch off those. Rows that are values of states are left out."""
    # Strictly later: a row that branches off at `step` itself shares the state before the step, and
    # not the latent after it.
    later = [child for child in branches[n] if rows[child].start > step and not rows[child].value]
    return [n] + [
        leaf for child in later for leaf in _below(rows, branches, child, rows[child].start)
    ]


def _value_after(
    rows: list[Row],
    branches: dict[int, list[int]],
    values: dict[tuple[int, int], int],
    n: int,
    step: int,
) -> int | None:
    """The row whose reward is the value of row n after `step`: the completion of the next state on
    the row, or the row itself if no state follows. None if that state has no value.

    Between `step` and the next state the row follows the ODE, so both points have the same
    completion.
    """
    steps = {*rows[n].noise, *(rows[child].start for child in branches[n])}
    later = [k for k in steps if k > step]
    return values.get((n, min(later))) if later else n
