"""Numbers for everything that an iteration integrates: the same on every rank, so that ranks agree
without a message.

A plan makes the rows of one unit at a time. Here they become states, slots and, for the units that
are integrated together, a forest whose parents come before their children.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tempflow.types import Row, Slots, Unit

ENDPOINT = -1  # the step of slots that are endpoints


def iteration_units(prompt_ids: list[int], seeds: int) -> list[Unit]:
    """All units of an iteration, prompt by prompt."""
    return [
        Unit(p * seeds + s, p, prompt_id, s)
        for p, prompt_id in enumerate(prompt_ids)
        for s in range(seeds)
    ]


@dataclass(frozen=True)
class Forest:
    """Rows that are integrated together. Parents are places in `rows`, and come before their
    children."""

    rows: list[Row]
    numbers: list[int]
    """Each row's number among the rows of all units."""
    slots: dict[tuple[int, int], np.ndarray]
    """int [B]: the slots of the state at (place of the row, step); empty where slots are
    endpoints."""

    @cached_property
    def depth(self) -> list[int]:
        """How many branches lie between each row and the initial noise."""
        found: list[int] = []
        for row in self.rows:
            found.append(0 if row.parent is None else found[row.parent] + 1)
        return found

    @cached_property
    def branches(self) -> dict[tuple[int, int], list[int]]:
        """The rows that branch off, by (place of their parent, step)."""
        found = defaultdict(list)
        for n, row in enumerate(self.rows):
            if row.parent is not None:
                found[row.parent, row.start].append(n)
        return dict(found)


class Layout:
    """The rows of all units of an iteration, and the slots of their states or endpoints.

    first: int [units + 1], the number of each unit's first row among the rows of all units.

    Args:
        units: of all ranks, in order.
        rows: of each unit, parents before children, as `Plan.rows` makes them.
        endpoints: make a slot of every row, whatever noise it took, instead of every child of a
            state.
    """

    def __init__(self, units: list[Unit], rows: list[list[Row]], endpoints: bool = False):
        self.units, self.rows = units, rows
        self.first = np.cumsum([0, *map(len, rows)])
        self._slots: dict[tuple[int, int, int], np.ndarray] = {}
        self.slots = self._endpoint_slots() if endpoints else self._state_slots()

    def __len__(self) -> int:
        """Rows of all units."""
        return int(self.first[-1])

    @cached_property
    def without_slot(self) -> np.ndarray:
        """Numbers of the rows whose reward is neither a slot's nor a state's value, like a
        trunk's."""
        values = np.flatnonzero([row.value for unit in self.rows for row in unit])
        return np.setdiff1d(
            np.arange(len(self)), [*values, *(row for rows in self.slots.leaves for row in rows)]
        )

    @cached_property
    def completions(self) -> np.ndarray:
        """int [slots]: number of the row that the slot's state lies on, where it follows the ODE
        from there on, like a trunk; else -1."""
        found = np.full(len(self.slots), -1)
        for (u, n, step), slots in self._slots.items():
            if not any(k >= step for k in self.rows[u][n].noise):
                found[slots] = self.first[u] + n
        return found

    def forest(self, chosen: list[int]) -> Forest:
        """The rows of some units (places in `units`): all roots first, then their children, and so
        on, unit by unit."""
        lines = [
            (_depth(self.rows[u], n), k, n)
            for k, u in enumerate(chosen)
            for n in range(len(self.rows[u]))
        ]
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
        lines: list[tuple[int, ...]] = []
        leaves: list[tuple[int, ...]] = []
        values: list[list[int]] = []
        states = 0
        for u, rows in enumerate(self.rows):
            branches, value_rows = (
                _branches(rows),
                {(row.parent, row.start): n for n, row in enumerate(rows) if row.value},
            )
            for (parent, step), members in states_of(rows).items():
                self._slots[u, parent, step] = np.arange(len(lines), len(lines) + len(members))
                for child, n in enumerate(members):
                    lines.append((rows[n].unit.prompt, rows[n].unit.seed, step, states, child))
                    leaves.append(
                        tuple(
                            int(self.first[u]) + leaf
                            for leaf in sorted(_below(rows, branches, n, step))
                        )
                    )
                    pair = (
                        value_rows.get((parent, step)),
                        _value_after(rows, branches, value_rows, n, step),  # type: ignore[arg-type]  # rows with a value have a parent
                    )
                    values.append(
                        [-1 if place is None else int(self.first[u]) + place for place in pair]
                    )
                states += 1
        known = any(row.value for rows in self.rows for row in rows)
        before, after = np.array(values, dtype=np.int64).reshape(-1, 2).T if known else (None, None)
        return Slots(**_columns(lines), leaves=tuple(leaves), before=before, after=after)

    def _endpoint_slots(self) -> Slots:
        rows = [row for unit in self.rows for row in unit]
        lines: list[tuple[int, ...]] = [
            (row.unit.prompt, row.unit.seed, ENDPOINT, n, 0) for n, row in enumerate(rows)
        ]
        return Slots(**_columns(lines), leaves=tuple((n,) for n in range(len(rows))))


def states_of(rows: list[Row]) -> dict[tuple[int, int], list[int]]:
    """The states of a unit's rows, by (row, step), in order of step: the rows that take noise
    there, as the state's children.

    A row that goes on by the SDE is the first child of its own state; rows that branch off there
    follow.
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
    """The int64 columns [n] of `Slots`, by name."""
    columns = np.array(lines, dtype=np.int64).reshape(-1, 5).T
    return dict(zip(("prompt", "seed", "step", "state", "child"), columns, strict=True))


def _depth(rows: list[Row], n: int) -> int:
    parent = rows[n].parent
    return 0 if parent is None else _depth(rows, parent) + 1


def _branches(rows: list[Row]) -> dict[int, list[int]]:
    found = defaultdict(list)
    for n, row in enumerate(rows):
        if row.parent is not None:
            found[row.parent].append(n)
    return found


def _below(rows: list[Row], branches: dict[int, list[int]], n: int, step: int) -> list[int]:
    """The rows that hold what row n is after `step`: itself and all that branch off it later, with
    all that branch off those.

    Rows that are values of states are not among them.
    """
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
    """The row whose reward is the value of what row n is after `step`: that of the next state on
    its way, or its own end.

    The ODE leads from there to the next state, so both have the same completion. None where that
    state has no value.
    """
    steps = {*rows[n].noise, *(rows[child].start for child in branches[n])}
    later = [k for k in steps if k > step]
    return values.get((n, min(later))) if later else n
