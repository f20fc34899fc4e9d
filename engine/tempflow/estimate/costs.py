"""Count the forwards of an iteration and their seconds.

Seconds are floating point operations divided by a stated speed; rewards, communication between
ranks and waiting are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tempflow.config import Config
from tempflow.estimate.model import Model, Pass
from tempflow.sampling.layout import states_of
from tempflow.sampling.suffix import count_forwards
from tempflow.types import ANY_UNIT, Row


@dataclass(frozen=True)
class Phase:
    """One kind of work in an iteration."""

    name: str
    """One of the keys of `show.NAMES`."""
    forwards: int
    """Forwards, counted in rows, on all GPUs together."""
    busiest: int
    """Forwards of the GPU with the most units."""
    flops: int
    """Floating point operations of one row."""
    seconds: float
    """Time of the busiest GPU, for which all others wait."""
    share: float = 1.0
    """Share of iterations that have this phase."""


def unit_rows(config: Config) -> list[Row]:
    """The rows of a unit in the first iteration.

    If rollout.adapt draws branch steps at random, the steps with the most forwards are taken, so
    that the estimate is an upper bound.
    """
    r, plan = config.rollout, config.plan()
    if r.adapt is None or r.adapt.steps is None:
        return plan.rows(ANY_UNIT, 0)

    def forwards(step: int) -> int:
        return count_forwards(plan.at_steps([step]).rows(ANY_UNIT, 0), r.num_steps, r.suffix)

    # config.checks refuses rollout.adapt.steps for plans without.
    assert plan.branch_steps is not None
    steps = sorted(plan.branch_steps.possible(r.num_steps), key=forwards)
    return plan.at_steps(steps[-r.adapt.steps :]).rows(ANY_UNIT, 0)


def unit_states(config: Config) -> list[int]:
    """The number of children of each state of a unit that is trained on, in the first iteration.

    Objectives on finished latents make `draws` states of each latent (or one), with one child each.
    """
    objective = config.objective()
    if objective.wants == "endpoints":
        # A draw is a noise level of its own, and there are no more of them than steps of the grid.
        draws = min(getattr(objective, "draws", 1), config.rollout.num_steps)
        return [1] * draws * len(unit_rows(config))
    return [len(children) for children in states_of(unit_rows(config)).values()]


def busiest_units(config: Config, gpus: int) -> int:
    """Units of the GPU with the most of them."""
    # Rounded up: units are dealt whole, so some ranks may have one more than others.
    return -(-config.data.prompts_per_iteration * config.plan().seeds // gpus)


def phases(config: Config, model: Model, gpus: int, speed: float) -> list[Phase]:
    """The phases of an iteration, in the order in which they run.

    Args:
        config: of the run.
        model: its model without weights.
        gpus: number of GPUs.
        speed: floating point operations per second of one GPU.
    """
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

    # `flops` are those of one row, so the number of rows in a forward does not change the sums.
    forward, states = model.forward(r.rows), len(unit_states(config))
    found = [
        phase("rollout", count_forwards(rows, r.num_steps, r.suffix), forward),
        phase("decode", len(rows), model.decode()),
    ]
    if config.needs_reference():
        found.append(phase("reference", states, forward))
    parts = t.updates.parts
    # Ratios need the policy before the iteration's updates. The first part computes it in its own
    # forward; the states of later parts are forwarded before the first step changes the weights.
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
                1 / r.suffix.audit_every,
            )
        )
    if config.data.heldout and config.eval.every:
        # Evaluations are counted apart: guidance, steps and prompts may differ from the rollout's.
        steps, mine = config.eval.num_steps or r.num_steps, -(-config.eval.prompts // gpus)
        flops = model.forward(min(r.rows, mine), config.eval_guidance()).flops
        found.append(
            Phase(
                "evaluation",
                config.eval.prompts * steps,
                mine * steps,
                flops,
                _seconds(mine * steps * flops, speed),
                1 / config.eval.every,
            )
        )
    return found


def training_rows(config: Config, gpus: int, ragged: bool = False) -> int:
    """Rows of the largest micro-batch in training.

    No state is left out, although in a run states whose advantages are all zero are not forwarded.

    Args:
        config: of the run.
        gpus: number of GPUs.
        ragged: whether prompts differ in shape.
    """
    states = -(
        -busiest_units(config, gpus) * len(unit_states(config)) // config.training.updates.parts
    )
    # Rows of different shapes have micro-batches of their own, so one of them may be full. Else the
    # trainer makes all micro-batches about equally large: 10 states, at most 4 at a time, are 4, 3
    # and 3.
    if ragged:
        return min(states, config.training.states)
    return -(-states // -(-states // config.training.states))


def _seconds(flops: int, speed: float) -> float:
    # Configs may ask for absurd sizes, and float() of an integer beyond 10^308 raises.
    return float(flops) / speed if flops < 10**300 else math.inf
