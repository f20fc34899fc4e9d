"""Parts of an update: disjoint shares of the states with an optimizer step each, the same whatever
the number of ranks."""

import numpy as np
import pytest
import torch
from engine_cases import Iteration, PlainRuntime, flat, small_config
from kernel_cases import assert_close
from run_cases import train

from tempflow.sampling.layout import iteration_units
from tempflow.training.credit import make_parts, shares
from tempflow.types import State

TABLE = {"num_steps": 4, "plan": {"seeds": 2, "children": 3, "branch_steps": [0, 2]}}


@pytest.fixture(scope="module")
def iteration(policy):
    return Iteration(policy, small_config(rollout=TABLE))


def parts_of(iteration, count):
    session = iteration.session.variant(
        small_config(rollout=TABLE, training={"updates": {"parts": count}})
    )
    return make_parts(session, iteration.rolled, iteration.advantages())


@pytest.mark.parametrize("count, sizes", [(1, [8]), (2, [4, 4]), (3, [2, 3, 3])])
def test_parts_share_out_the_states(iteration, count, sizes):
    """Each state once, those of a unit in turn from (prompt + seed) on; steps and prompts are
    spread."""
    parts = parts_of(iteration, count)
    assert [part.total for part in parts] == sizes
    seen = [
        (unit, round(s.item(), 6))
        for part in parts
        for batch in part.batches
        for unit, s in zip(batch.units, batch.sigma)
    ]
    assert len(seen) == len(set(seen)) == 8
    for n, part in enumerate(parts):
        for batch in part.batches:
            assert {
                (u.prompt + u.seed + (step == 2)) % count
                for u, step in zip(batch.units, batch.step.tolist())
            } == {n}
        assert len({s.item() for batch in part.batches for s in batch.sigma}) == 2, "both steps"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("prompts, seeds", [(12, 4), (8, 1), (2, 24)])
def test_every_rank_has_work_in_every_part(ranks, prompts, seeds):
    """Units are dealt to ranks in turn; of nine states each no rank has more than one a unit more
    in one of two parts."""
    units = iteration_units(list(range(prompts)), seeds)
    states = [
        State(unit, k, 0.5, 1.0, -0.1, 0.3, None, None, None) for unit in units for k in range(9)
    ]
    whole = shares(states, 2)
    for rank in range(ranks):
        mine = units[rank::ranks]
        found = shares([s for s in states if s.unit in mine], 2)
        assert abs(len(found[0]) - len(found[1])) <= len(mine)
        assert all([s for s in part if s.unit in mine] == own for part, own in zip(whole, found))
    for part in whole:
        assert {s.unit.index for s in part} == set(range(len(units)))
        assert {[s.step for s in part].count(k) for k in range(9)} == {len(units) // 2}


def test_gradients_of_the_parts_are_shares_of_the_whole(iteration):
    """At the same weights the mean of the parts' gradients, by their states, is the whole
    pass's."""
    found = {}
    for count in (1, 2):
        runtime = PlainRuntime(iteration.policy, drift=0.02)
        updater, whole = iteration.updater(runtime), 0
        parts = parts_of(iteration, count)
        for part in parts:
            updater.update(part, 1.0)
            whole = whole + flat(runtime.gradient()) * part.total / sum(p.total for p in parts)
        found[count] = whole
    assert found[1].norm() > 1e-4
    assert_close("gradient", found[2], found[1], 1e-5)


def test_a_later_part_has_the_old_policy_of_before_the_first_step(iteration):
    runtime = PlainRuntime(iteration.policy, drift=0.02)
    updater, (first, second) = iteration.updater(runtime), parts_of(iteration, 2)
    assert updater.remember(second) == 4
    kept = [old.log_prob.clone() for old in second.old]
    updater.update(first, 1.0)
    runtime.descend(runtime.gradient(), 1e-2)
    metrics = updater.update(second, 1.0)
    assert metrics["ratio/max_dev"] > 1e-6, "it is met with weights that have moved"
    assert all(torch.equal(old.log_prob, was) for old, was in zip(second.old, kept, strict=True))


@pytest.mark.slow
def test_a_run_in_parts(tmp_path):
    """Two optimizer steps an iteration; the second share's states are forwarded once more, without
    gradient."""
    run = train(
        tmp_path,
        "parts",
        processes=None,
        rollout=TABLE,
        training={"updates": {"parts": 2}, "iterations": 2},
        eval={"every": 0},
    )
    for row in run.rows[1:]:
        assert (
            row["forwards/train"] == 8 + 4 and np.isfinite(row["loss"]) and row["ratio/max_dev"] > 0
        )
