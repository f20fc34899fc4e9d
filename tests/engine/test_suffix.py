"""Coarser suffixes: they change what is rewarded, never what is trained on, and are as accurate as
their order says."""

import numpy as np
import pytest
import torch
from engine_cases import Iteration, plan_table, small_config
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_close
from rollout_cases import GRID, Rollout, toy_velocity

from tempflow.advantages import rank_correlation
from tempflow.config import Suffix
from tempflow.sampling.layout import iteration_units
from tempflow.sampling.suffix import count_forwards, suffix_path
from tempflow.training.credit import suffix_metrics

suffixes = st.builds(Suffix, stride=st.integers(2, 12), exact_steps=st.integers(0, 12))


@pytest.mark.parametrize(
    "first, suffix, path",
    [
        (1, None, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (2, Suffix(stride=2), [2, 4, 6, 8, 10]),
        (1, Suffix(stride=2), [1, 2, 4, 6, 8, 10]),
        (1, Suffix(stride=2, exact_steps=2), [1, 2, 3, 4, 6, 8, 10]),
        (3, Suffix(stride=3), [3, 4, 7, 10]),
        (5, Suffix(stride=64), [5, 10]),
        (9, Suffix(stride=2), [9, 10]),
        (10, Suffix(stride=2), [10]),
        (8, Suffix(stride=2, exact_steps=9), [8, 9, 10]),
    ],
)
def test_path(first, suffix, path):
    assert suffix_path(first, 10, suffix) == path


@given(st.integers(0, 30), st.integers(0, 30), suffixes)
def test_path_is_whole_and_never_longer_than_the_stride(first, length, suffix):
    path = suffix_path(first, first + length, suffix)
    gaps = np.diff(path)
    assert path[0] == first and path[-1] == first + length
    assert (
        (gaps >= 1).all()
        and (gaps <= suffix.stride).all()
        and (gaps[: suffix.exact_steps] == 1).all()
    )


@pytest.mark.parametrize(
    "suffix", [None, {}, {"stride": 3, "order": 1}, {"stride": 2, "exact_steps": 2}]
)
@pytest.mark.parametrize("plan", ["tempflow", "flow_grpo", "mix_grpo"])
def test_forwards_are_counted_beforehand(plan, suffix):
    config = small_config(
        rollout={
            "plan": plan_table(plan, seeds=2, children=2, branch_steps="all", window=3),
            "suffix": suffix,
        },
        training={"advantage": {"over": "seed" if plan == "tempflow" else "prompt"}},
    )
    units = iteration_units([5, 9], 2)
    run = Rollout(config, units)
    assert (
        run.stats.forwards == run.told == count_forwards(run.forest.rows, 10, config.rollout.suffix)
    )


def test_every_second_step_needs_the_forwards_of_the_cost_table():
    """280 exact forwards per unit at T = 10, B = 6 become 10 + 6 * 25."""
    config = small_config(rollout={"plan": {"children": 6, "branch_steps": "all"}, "suffix": {}})
    assert Rollout(config, iteration_units([3], 1)).stats.forwards == 160


@pytest.mark.parametrize("plan", ["tempflow", "mix_grpo"])
def test_states_are_those_of_the_exact_suffix(plan):
    """States, children and their log-probabilities to the last bit; and the trunk's own end."""
    table = {"plan": plan_table(plan, seeds=2, branch_steps="all", children=3, window=3)}
    group = {"advantage": {"over": "seed" if plan == "tempflow" else "prompt"}}
    units = iteration_units([5, 9], 2)
    exact, coarse = (
        Rollout(small_config(rollout={**table, "suffix": suffix}, training=group), units)
        for suffix in (None, {})
    )
    assert (
        exact.states.keys() == coarse.states.keys()
        and exact.finished.keys() == coarse.finished.keys()
    )
    for place, state in exact.states.items():
        for name in ("x", "children", "log_prob"):
            assert torch.equal(getattr(state, name), getattr(coarse.states[place], name))
    if plan == "tempflow":
        assert all(
            torch.equal(exact.finished[place], coarse.finished[place])
            for place in exact.finished
            if place[1] is None
        )
    assert any(
        not torch.equal(latent, coarse.finished[place]) for place, latent in exact.finished.items()
    )


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("exact_steps", [0, 2])
def test_equals_the_formula_step_by_step(order, exact_steps):
    """A jump is Euler's steps with velocities on the line through the last two; the first, with
    nothing behind it, one of Euler's. Before the next jump it is made again with velocities on the
    line through its own two ends."""
    suffix = {"stride": 2, "order": order, "exact_steps": exact_steps}
    config = small_config(
        rollout={"plan": {"children": 2, "branch_steps": [0, 3, 8]}, "suffix": suffix}
    )
    units = iteration_units([5, 9], 1)
    run = Rollout(config, units, micro_batch=5)
    grid = GRID.double()

    def velocity(x, k, unit):
        return toy_velocity(x[None], grid[k : k + 1], [unit])[0]

    for (index, k), state in run.states.items():
        unit = units[index]
        path = suffix_path(k + 1, 10, config.rollout.suffix)
        for child, start in enumerate(state.children):
            x, corrected, before, v_before = start.double(), start.double(), None, None

            def steps(x, now, then, v, slope):
                for j in range(now, then):
                    x = x + (grid[j + 1] - grid[j]) * (v + (grid[j] - grid[now]) * slope)
                return x

            for now, then in zip(path[:-1], path[1:]):
                v, slope = velocity(x, now, unit), 0
                if order == 2 and before is not None:
                    slope = (v - v_before) / (grid[now] - grid[before])
                    x = corrected = steps(corrected, before, now, v_before, slope)
                before, v_before = now, v
                x = steps(x, now, then, v, slope)
            assert_close(
                f"child {child} of {index} at {k}", run.finished[index, k, child], x.float(), 1e-5
            )


@pytest.mark.parametrize("order, least", [(1, 1.7), (2, 3.2)])
def test_distance_to_the_exact_suffix_falls_as_the_order_says(order, least):
    """Halving the steps of d x / d sigma = sin(3 sigma) x divides it by 2^order."""

    def velocity(x, sigma, units):
        return torch.sin(3 * sigma.double()).float().reshape(-1, 1, 1) * x

    distances = []
    for num_steps in (20, 40, 80):
        ends = []
        for suffix in ({"stride": 2, "order": order}, None):
            config = small_config(
                rollout={
                    "num_steps": num_steps,
                    "plan": {"children": 1, "branch_steps": [1], "seeds": 2},
                    "suffix": suffix,
                },
                training={"advantage": {"over": "prompt"}},
            )
            run = Rollout(
                config,
                iteration_units([1], 2),
                velocity=velocity,
                sigmas=torch.linspace(1, 0, num_steps + 1),
            )
            ends.append(run.finished[0, 1, 0])
        distances.append((ends[0] - ends[1]).norm().item())
    assert distances[0] / distances[1] > least and distances[1] / distances[2] > least, distances


# ---------------------------------------------------------------------------------------- the audit
def test_rank_correlation_by_hand():
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # ranks 1.5 1.5 3 4 and 1 2 3.5 3.5: covariance 1, variances 1.125
    assert rank_correlation(np.array([0.0, 0, 1, 2]), np.array([0.0, 1, 5, 5])) == pytest.approx(
        8 / 9
    )
    assert np.isnan(rank_correlation(np.array([1.0, 1]), np.array([1.0, 2]))) and np.isnan(
        rank_correlation(np.array([]), np.array([]))
    )


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20, unique=True))
def test_rank_correlation_sees_the_order_only(values):
    values = np.array(values)
    assert rank_correlation(values, np.exp(values / 5)) == pytest.approx(1) or len(
        np.unique(np.exp(values / 5))
    ) < len(values)


def test_audit_scores_the_same_rows_with_the_exact_suffix(policy):
    """Its rewards are those of a run without suffix, and the metrics compare the two; without an
    audit there are none."""
    table = {"num_steps": 6, "plan": {"branch_steps": [0, 2], "children": 3}}
    exact = Iteration(policy, small_config(rollout=table))
    coarse = Iteration(policy, small_config(rollout={**table, "suffix": {}}))
    again = coarse.roll_out(None)
    np.testing.assert_allclose(again.rewards.total, exact.rewards, atol=1e-4)
    assert np.abs(coarse.rewards - exact.rewards).max() > 1e-3
    credit, found = (
        coarse.advantages(),
        suffix_metrics(coarse.session, coarse.scored, coarse.advantages(), coarse.rolled, again),
    )
    best = exact.advantages()
    assert found["suffix/reward_rank_correlation"] == pytest.approx(
        rank_correlation(coarse.rewards, exact.rewards), abs=1e-2
    )
    assert found["suffix/advantage_rank_correlation"] == pytest.approx(
        rank_correlation(credit.values, best.values), abs=0.05
    )
    assert suffix_metrics(coarse.session, coarse.scored, credit, coarse.rolled, None) == {}
