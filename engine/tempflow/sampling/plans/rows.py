"""The rows of an iteration on one rank, as the scheduler integrates them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tempflow.config import Config
from tempflow.types import Unit


@dataclass(frozen=True)
class Row:
    """One latent being integrated.

    unit: whose initial noise it stems from. parent: the row it branches off at step `start`, or None for the
    initial noise. noise: the steps at which it goes on by the SDE. child: its number among its parent's children.
    """

    unit: Unit
    start: int = 0
    noise: frozenset[int] = frozenset()
    parent: int | None = None
    child: int = 0


@dataclass(frozen=True)
class RowPlan:
    """Rows of one iteration on one rank. steps: the stochastic steps; width: children per decision."""

    rows: list[Row]
    steps: list[int]
    width: int


def iteration_units(prompt_ids: list[int], seeds: int) -> list[Unit]:
    """All units of an iteration, prompt by prompt."""
    return [Unit(p * seeds + s, p, prompt_id, s) for p, prompt_id in enumerate(prompt_ids) for s in range(seeds)]


def build_plan(config: Config, units: list[Unit], iteration: int) -> RowPlan:
    """The rows of `units` under the config's plan: those that start from noise first, then all that branch off one of them."""
    plan = config.plan()
    found = [(n, row) for unit in units for n, row in enumerate(plan.rows(unit, iteration))]
    roots = [row for _, row in found if row.parent is None]
    place = {(row.unit, n): i for i, (n, row) in enumerate((n, row) for n, row in found if row.parent is None)}
    branches = [row for _, row in found if row.parent is not None]
    rows = [Row(row.unit, noise=row.noise) for row in roots]
    rows += [Row(row.unit, row.start, row.noise, place[row.unit, row.parent], row.path[0]) for row in branches]
    return RowPlan(rows, plan.steps(iteration), plan.children)


def split_plan(plan: RowPlan, parts: int) -> list[tuple[RowPlan, list[int]]]:
    """At most `parts` plans of whole units, dealt in turn, each with its rows' places in the whole plan."""
    places: list[list[int]] = [[] for _ in range(parts)]
    order = {unit: n for n, unit in enumerate(dict.fromkeys(row.unit for row in plan.rows))}
    for place, row in enumerate(plan.rows):
        places[order[row.unit] % parts].append(place)
    return [(_part(plan, chosen), chosen) for chosen in places if chosen]


def _part(plan: RowPlan, chosen: list[int]) -> RowPlan:
    moved = {place: n for n, place in enumerate(chosen)}
    rows = [plan.rows[place] for place in chosen]
    return RowPlan([replace(row, parent=None if row.parent is None else moved[row.parent]) for row in rows], plan.steps, plan.width)
