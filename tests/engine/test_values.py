"""Values of the states on a path: rows that complete them by the ODE, and the advantages made of
their rewards."""

import numpy as np
import pytest
import torch
from engine_cases import Iteration, small_config
from kernel_cases import assert_close
from rollout_cases import GRID, Rollout, layout_of, toy_velocity

from tempflow.advantages.dense import Dense
from tempflow.advantages.stepwise import Stepwise
from tempflow.advantages.turning_point import TurningPoint
from tempflow.config import Suffix
from tempflow.errors import UserError
from tempflow.sampling.layout import Layout, iteration_units
from tempflow.sampling.plans.flow_grpo import FlowGrpo
from tempflow.sampling.plans.mix_grpo import MixGrpo
from tempflow.sampling.suffix import suffix_path
from tempflow.types import Rewards, Row, Unit

STEPS = len(GRID) - 1


def valued(kind=FlowGrpo, **options):
    made = kind(values=True, **options)
    made.prepare(STEPS, 0)
    return made


def config_of(branch_steps, suffix=None, values=True):
    plan = {"type": "flow_grpo", "seeds": 2, "branch_steps": branch_steps, "values": values}
    advantage = {"type": "dense" if values else "group", "over": "prompt"}
    return small_config(rollout={"plan": plan, "suffix": suffix}, training={"advantage": advantage})


# ------------------------------------------------------------------------------------------- layout
def test_every_slot_finds_the_values_around_it():
    """Of a path with noise at 1, 4 and 7: rows 1 to 3 complete its states, and the last value is
    the path's own reward."""
    found = layout_of(valued(seeds=2, branch_steps=[1, 4, 7]), iteration_units([5], 2))
    slots = found.slots
    assert (
        len(found) == 8
        and slots.step.tolist() == [1, 4, 7] * 2
        and slots.leaves == ((0,),) * 3 + ((4,),) * 3
    )
    assert slots.before.tolist() == [1, 2, 3, 5, 6, 7] and slots.after.tolist() == [
        2,
        3,
        0,
        6,
        7,
        4,
    ]
    assert len(found.without_slot) == 0
    before, after = slots.values(np.array([0.9, 0.2, 0.5, 0.4, 1, np.nan, 2, 3]))
    np.testing.assert_array_equal(before, [0.2, 0.5, 0.4, np.nan, 2, 3])
    np.testing.assert_array_equal(after, [0.5, 0.4, 0.9, 2, 3, 1])
    assert Layout(found.units, [rows[:1] for rows in found.rows]).slots.values(np.zeros(2)) == (
        None,
        None,
    )


def test_a_window_and_narrowed_steps():
    units = iteration_units([5], 1)
    window = layout_of(valued(MixGrpo, window=2, every=1), units, iteration=3).slots
    assert (
        window.step.tolist() == [3, 4]
        and window.before.tolist() == [1, 2]
        and window.after.tolist() == [2, 0]
    )
    narrowed = layout_of(valued().at_steps([2, 6]), units).slots
    assert narrowed.step.tolist() == [2, 6] and narrowed.before.tolist() == [1, 2]


def test_a_tree_with_some_values():
    """Also where rows branch; a state without a value leaves the children on both sides of it
    without one."""
    (unit,) = iteration_units([3], 1)
    rows = [
        Row(unit, noise=frozenset([0, 5])),
        Row(unit, 3, frozenset([3, 6]), 0, (1,)),
        Row(unit, 0, parent=0, value=True),
    ]
    rows += [Row(unit, 6, parent=1, value=True), Row(unit, 5, parent=0, value=True)]
    slots = Layout([unit], [rows]).slots
    assert list(zip(slots.step, slots.before, slots.after)) == [
        (0, 2, -1),
        (3, -1, 3),
        (5, 4, 0),
        (6, 3, 1),
    ]
    assert slots.leaves == ((0, 1), (1,), (0,), (1,))


def test_calibrated_noise_may_read_the_values_alone():
    rollout = {
        "plan": {"type": "flow_grpo", "branch_steps": [0, 2], "values": True},
        "adapt": {"noise": {}},
    }
    plan = small_config(rollout=rollout, training={"advantage": {"over": "prompt"}}).plan()
    assert [row.value for row in plan.rows(Unit(0, 0, 0, 0), 0)] == [False, True, True]


# ---------------------------------------------------------------------------------------- scheduler
def ode(x, unit, points):
    """Along grid points, by Euler's steps."""
    for k, goal in zip(points[:-1], points[1:], strict=True):
        x = x + (GRID[goal] - GRID[k]) * toy_velocity(x[None], GRID[k : k + 1], [unit])[0]
    return x


@pytest.mark.parametrize("suffix", [None, {"stride": 2, "order": 1}, {"stride": 10, "order": 1}])
def test_a_value_is_the_odes_completion_of_the_paths_state(suffix):
    """Its first step is the path's own forward; a suffix applies after it. A long stride is one
    step to the end."""
    units, config = iteration_units([5, 2], 1), config_of([0, 3, 4, 8], suffix)
    run = Rollout(config, units)
    for unit in units:
        for k in (0, 3, 4, 8):
            points = [k, *suffix_path(k + 1, STEPS, suffix and Suffix(**suffix))]
            expected = ode(run.states[unit.index, k].x, unit, points)
            assert_close(
                f"unit {unit.index}, value at {k}", run.finished[unit.index, k, 0], expected, 1e-5
            )
    plain = Rollout(config_of([0, 3, 4, 8], suffix, values=False), units)
    for place, state in plain.states.items():
        assert torch.equal(state.x, run.states[place].x) and torch.equal(
            state.children, run.states[place].children
        )
        assert len(run.states[place].children) == 1, "a value is no child of its state"


def test_values_share_the_paths_forwards():
    """Ten of the path; a value at step k has 9 - k of its own."""
    run = Rollout(config_of("all"), iteration_units([5], 2))
    assert (
        run.stats.forwards == 2 * (10 + sum(9 - k for k in range(9)))
        and len(run.finished) == 2 * 10
    )


# --------------------------------------------------------------------------------------- advantages
def slots_and_rewards(*paths):
    """Of one prompt: a path for each list of values R_0 .. R_K, the last of which is its own
    reward."""
    plan = valued(seeds=len(paths), branch_steps=list(range(len(paths[0]) - 1)))
    slots = layout_of(plan, iteration_units([0], len(paths))).slots
    rows = np.concatenate([[values[-1], *values[:-1]] for values in paths])
    total = slots.means(rows[None])[0]
    return slots, Rewards(total, {}, {}, {}, *slots.values(rows))


def normal(values):
    values = np.asarray(values)
    return (values - values.mean()) / (values.std() + 1e-4)


def test_dense_by_hand():
    """Gains .3, -.1, .5, whose sum is what the path gains; each step is a group over the paths."""
    slots, rewards = slots_and_rewards([0.2, 0.5, 0.4, 0.9], [0.3, 0.3, 0.5, 0.5])
    np.testing.assert_allclose((rewards.after - rewards.before)[:3], [0.3, -0.1, 0.5])
    assert (rewards.after - rewards.before)[:3].sum() == pytest.approx(0.7)
    found = Dense()(slots, rewards)
    expected = np.stack(
        [normal([0.3, 0.0]), normal([-0.1, 0.2]), normal([0.5, 0.0])], axis=1
    ).ravel()
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)
    assert (
        found.valid.all()
        and found.spread == pytest.approx({0: 0.15, 1: 0.15, 2: 0.25})
        and not found.zero_spread.any()
    )
    assert np.abs(Dense(clip=0.5)(slots, rewards).values).max() == 0.5


def test_stepwise_by_hand():
    """All gains of the prompt together."""
    slots, rewards = slots_and_rewards([0.2, 0.5, 0.4, 0.9], [0.3, 0.3, 0.5, 0.5])
    found = Stepwise()(slots, rewards)
    np.testing.assert_allclose(found.values, normal([0.3, -0.1, 0.5, 0.0, 0.2, 0.0]), rtol=1e-5)
    assert found.zero_spread.shape == (1,) and found.spread == pytest.approx(
        {0: 0.15, 1: 0.15, 2: 0.25}
    )


@pytest.mark.parametrize(
    "values, first, credit",
    [
        ([0.2, 0.5, 0.4, 0.9], False, [0.3, -0.1, 0.5]),
        ([0.2, 0.5, 0.4, 0.9], True, [0.7, -0.1, 0.5]),
        ([0.5, 0.3, 0.6, 0.5, 0.9], False, [-0.2, 0.6, -0.1, 0.4]),
        ([0.5, 0.3, 0.6, 0.5, 0.9], True, [-0.2, 0.6, -0.1, 0.4]),
        ([0.5, 0.6, 0.4, 0.3], False, [0.1, -0.3, -0.1]),  # down on the whole: the fall turns it
        ([0.5, 0.5, 0.6, 0.6], True, [0.0, 0.1, 0.0]),  # no way is not the other way
        ([0.5, 0.4, 0.5], True, [-0.1, 0.1]),  # the whole has no way
    ],
)
def test_turning_points_by_hand(values, first, credit):
    slots, rewards = slots_and_rewards(values, values[::-1])
    found = TurningPoint(first=first).credit(slots, rewards)
    np.testing.assert_allclose(found[: len(credit)], credit, atol=1e-12)
    other = slots_and_rewards(values[::-1])
    np.testing.assert_allclose(
        found[len(credit) :],
        TurningPoint(first=first).credit(*other),
        err_msg="paths are their own",
    )


def test_turning_points_are_normalized_by_step():
    slots, rewards = slots_and_rewards([0.5, 0.3, 0.6, 0.5, 0.9], [0.0, 0.1, 0.2, 0.3, 0.4])
    expected = np.stack(
        [normal(pair) for pair in ([-0.2, 0.1], [0.6, 0.1], [-0.1, 0.1], [0.4, 0.1])], axis=1
    ).ravel()
    np.testing.assert_allclose(TurningPoint()(slots, rewards).values, expected, rtol=1e-5)


NAN = float("nan")


@pytest.mark.parametrize("how", [Dense(), Stepwise()])
@pytest.mark.parametrize("failed, valid", [(0, [0, 1, 1]), (1, [0, 0, 1]), (3, [1, 1, 0])])
def test_failed_values_mask_the_slots_that_need_them(how, failed, valid):
    values = [0.2, 0.5, 0.4, 0.9]
    values[failed] = NAN
    slots, rewards = slots_and_rewards(values, [0.3, 0.3, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4])
    found = how(slots, rewards)
    assert (
        found.valid.tolist() == [*map(bool, valid), *[True] * 6] and np.isfinite(found.values).all()
    )
    assert (found.values[:3][~found.valid[:3]] == 0).all() and found.values[3:].any()


@pytest.mark.parametrize(
    "values, first, credit",
    [
        ([NAN, 0.5, 0.4, 0.9], False, [NAN, NAN, NAN]),  # which way the whole goes is not known
        # a first step does not turn, whatever the rest
        ([0.2, 0.5, 0.4, NAN], False, [0.3, NAN, NAN]),
        ([0.2, 0.5, 0.4, NAN], True, [NAN, NAN, NAN]),
        ([0.2, NAN, 0.4, 0.9], False, [NAN, NAN, NAN]),  # the last may or may not turn
        # what goes the other way does not
        ([0.2, NAN, 0.4, 0.3, 0.9], False, [NAN, NAN, -0.1, 0.6]),
    ],
)
def test_a_turn_that_is_not_known_is_masked(values, first, credit):
    np.testing.assert_allclose(TurningPoint(first=first).credit(*slots_and_rewards(values)), credit)


def test_turning_points_need_single_paths():
    (unit,) = iteration_units([3], 1)
    rows = [
        Row(unit, noise=frozenset([0, 1])),
        Row(unit, 1, frozenset([1]), 0, (1,)),
        Row(unit, 0, parent=0, value=True),
    ]
    slots = Layout([unit], [rows]).slots
    with pytest.raises(UserError, match="turning_point needs a plan with one path for each seed"):
        TurningPoint()(slots, Rewards(np.zeros(3), {}, {}, {}, np.zeros(3), np.zeros(3)))


def test_one_rollout_on_the_shipped_model(policy):
    """Every state and end is an image; the gains of a path add up to what it gains, and groups sum
    to nothing."""
    rollout = {
        "plan": {"type": "flow_grpo", "seeds": 3, "branch_steps": [0, 2], "values": True},
        "num_steps": 4,
    }
    found = Iteration(policy, small_config(rollout=rollout, training={"advantage": "dense"}))
    rewards, slots = found.scored.rewards, found.slots
    assert (
        found.scored.images == 2 * 3 * 3
        and len(found.states) == 2 * 3 * 2
        and np.isnan(found.scored.trunk)
    )
    gains = np.bincount(slots.groups("seed", by_step=False), weights=rewards.after - rewards.before)
    np.testing.assert_allclose(gains, (rewards.total - rewards.before)[slots.step == 0])
    credit = found.advantages()
    assert credit.values.any() and np.allclose(
        np.bincount(slots.groups("prompt"), weights=credit.values), 0, atol=1e-3
    )
