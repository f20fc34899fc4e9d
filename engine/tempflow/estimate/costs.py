"""Forwards of an iteration and their seconds: floating point operations over the stated speed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tempflow.config import Config
from tempflow.estimate.model import Model, Pass
from tempflow.sampling.layout import states_of
from tempflow.sampling.suffix import count_forwards
from tempflow.types import Row, Unit


@dataclass(frozen=True)
class Phase:
    """Part of an iteration."""

    name: str
    forwards: int
    """Rows of all GPUs together."""
    busiest: int
    """Rows of the GPU that has most."""
    flops: int
    """Of one row."""
    seconds: float
    """Of the busiest GPU."""
    share: float = 1.0
    """Of iterations that have it."""


ONE = Unit(0, 0, 0, 0)


def unit_rows(config: Config) -> list[Row]:
    """The rows of a unit of work in the first iteration; of branch steps that are drawn, those that
    take most forwards."""
    r, plan = config.rollout, config.plan()
    if r.adapt is None or r.adapt.steps is None:
        return plan.rows(ONE, 0)

    def forwards(step: int) -> int:
        return count_forwards(plan.at_steps([step]).rows(ONE, 0), r.num_steps, r.suffix)

    steps = sorted(plan.branch_steps.possible(r.num_steps), key=forwards)  # type: ignore[union-attr]  # config.checks refuses rollout.adapt for plans without
    return plan.at_steps(steps[-r.adapt.steps :]).rows(ONE, 0)


def unit_states(config: Config) -> list[int]:
    """How many children leave each state of a unit of work that is trained on, in the first
    iteration.

    What an objective makes of finished latents has one child: as many states of each latent as it
    has `draws`, or one.
    """
    objective = config.objective()
    if objective.wants == "endpoints":
        draws = min(getattr(objective, "draws", 1), config.rollout.num_steps)
        return [1] * draws * len(unit_rows(config))
    return [len(children) for children in states_of(unit_rows(config)).values()]


def busiest_units(config: Config, gpus: int) -> int:
    """Units of the GPU that has most."""
    return -(-config.data.prompts_per_iteration * config.plan().seeds // gpus)


def phases(config: Config, model: Model, gpus: int, speed: float) -> list[Phase]:
    """speed: operations that a GPU makes in a second."""
    r, t, rows = config.rollout, config.training, unit_rows(config)
    units, busiest = (
        config.data.prompts_per_iteration * config.plan().seeds,
        busiest_units(config, gpus),
    )

    def phase(name: str, each: int, one: Pass, share: float = 1.0) -> Phase:
        return Phase(
            name,
            units * each,
            busiest * each,
            one.flops,
            _seconds(busiest * each * one.flops, speed),
            share,
        )

    forward, states = model.forward(r.rows), len(unit_states(config))
    found = [
        phase("rollout", count_forwards(rows, r.num_steps, r.suffix), forward),
        phase("decode", len(rows), model.decode()),
    ]
    if config.needs_reference():
        found.append(phase("reference", states, forward))
    parts = t.updates.parts
    # all but the first part's states are forwarded before the first step moves the weights
    if parts > 1:
        of_all, of_busiest = (n * states * (parts - 1) // parts for n in (units, busiest))
        found.append(
            Phase(
                "old policy",
                of_all,
                of_busiest,
                forward.flops,
                _seconds(of_busiest * forward.flops, speed),
            )
        )
    found.append(
        phase(
            "training",
            states * t.updates.passes,
            model.training(training_rows(config, gpus, model.ragged)),
        )
    )
    if r.suffix and r.suffix.audit_every:
        found.append(
            phase(
                "audit",
                count_forwards(rows, r.num_steps, None),
                forward,
                1 / min(r.suffix.audit_every, 10**9),
            )
        )
    if config.data.heldout and config.eval.every:
        steps, mine = config.eval.num_steps or r.num_steps, -(-config.eval.prompts // gpus)
        flops = model.forward(min(r.rows, mine), config.eval_guidance()).flops
        found.append(
            Phase(
                "evaluation",
                config.eval.prompts * steps,
                mine * steps,
                flops,
                _seconds(mine * steps * flops, speed),
                1 / min(config.eval.every, 10**9),
            )
        )
    return found


def training_rows(config: Config, gpus: int, ragged: bool = False) -> int:
    """Rows of the largest micro-batch: the trainer makes them even, those of each shape for
    themselves. Every state is taken to have something to teach."""
    states = -(
        -busiest_units(config, gpus) * len(unit_states(config)) // config.training.updates.parts
    )
    if ragged:
        return min(states, config.training.states)
    return -(-states // -(-states // config.training.states))


def _seconds(flops: int, speed: float) -> float:
    return float(flops) / speed if flops < 10**300 else math.inf
