"""Plans: which latents an iteration integrates, where each starts, and at which steps it takes noise.

A row is one latent. A plan is a list of rows; a new method is a new plan. Every stochastic transition becomes part of a
decision: the state it left from and the children that left there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tempflow.config import Config, RandomSteps


@dataclass(frozen=True)
class Unit:
    """One (prompt, seed) of an iteration: what is dealt to ranks.

    index: place in the iteration; prompt: place among its prompts; prompt_id: place in the prompt file.
    """

    index: int
    prompt: int
    prompt_id: int
    seed: int


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
class Plan:
    """Rows of one iteration on one rank. steps: the stochastic steps; width: children per decision."""

    rows: list[Row]
    steps: list[int]
    width: int


def iteration_units(prompt_ids: list[int], seeds: int) -> list[Unit]:
    """All units of an iteration, prompt by prompt."""
    return [Unit(p * seeds + s, p, prompt_id, s) for p, prompt_id in enumerate(prompt_ids) for s in range(seeds)]


def chosen_steps(config: Config, iteration: int) -> list[int]:
    """The stochastic steps of an iteration, the same on every rank."""
    r, allowed = config.rollout, config.steps_with_noise()
    if r.plan == "mix_grpo":
        places = r.num_steps - r.window.size
        first = iteration // r.window.every % places
        return list(range(first, first + r.window.size))
    if isinstance(r.branch_steps, RandomSteps):
        rng = np.random.default_rng([config.training.seed, iteration])
        strata = np.array_split(np.array(allowed), r.branch_steps.random)
        return [int(rng.choice(stratum)) for stratum in strata]
    return allowed


def build_plan(config: Config, units: list[Unit], iteration: int) -> Plan:
    """The rows of `units` under the config's plan.

    tempflow: per unit one trunk without noise, and at each step `children` rows that branch off it there.
    flow_grpo and mix_grpo: per unit one row that takes noise at each step.
    """
    steps = chosen_steps(config, iteration)
    if config.rollout.plan == "tempflow":
        return tempflow_plan(units, steps, config.rollout.children)
    return Plan([Row(unit, noise=frozenset(steps)) for unit in units], steps, 1)


def tempflow_plan(units: list[Unit], steps: list[int], children: int) -> Plan:
    """Trunks first (row i is unit i's), then every child of every trunk."""
    rows = [Row(unit) for unit in units]
    for trunk, unit in enumerate(units):
        for k in steps:
            rows += [Row(unit, start=k, noise=frozenset([k]), parent=trunk, child=i) for i in range(children)]
    return Plan(rows, steps, children)


def split_plan(plan: Plan, parts: int) -> list[tuple[Plan, list[int]]]:
    """At most `parts` plans of whole units, dealt in turn, each with its rows' places in the whole plan."""
    places: list[list[int]] = [[] for _ in range(parts)]
    order = {unit: n for n, unit in enumerate(dict.fromkeys(row.unit for row in plan.rows))}
    for place, row in enumerate(plan.rows):
        places[order[row.unit] % parts].append(place)
    return [(_part(plan, chosen), chosen) for chosen in places if chosen]


def _part(plan: Plan, chosen: list[int]) -> Plan:
    moved = {place: n for n, place in enumerate(chosen)}
    rows = [plan.rows[place] for place in chosen]
    return Plan([replace(row, parent=None if row.parent is None else moved[row.parent]) for row in rows], plan.steps, plan.width)
