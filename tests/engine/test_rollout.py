"""Plans, noise and the row scheduler: the sample is a function of what it is, not of the batch it
was computed in.

The chain: rollout in any batch shape == rollout of each rank's share == one row at a time, written
out in engine_cases.
"""

import itertools

import numpy as np
import pytest
import torch
from engine_cases import (
    Iteration,
    examples,
    naive_trajectories,
    plan_table,
    small_config,
    step_noise,
    step_scalars,
)
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_close
from rollout_cases import GRID, SHAPE, Rollout, toy_velocity

from tempflow.config import Suffix
from tempflow.errors import UserError
from tempflow.models.embeddings import EmbeddingCache
from tempflow.run.evaluation import EVAL_ITERATION, fixed_noise
from tempflow.sampling.layout import iteration_units
from tempflow.sampling.noise import INITIAL, noise_key
from tempflow.types import Size

PROMPTS = ['the word "ABC"', 'the word "HELLO"', 'the word "TREE"']


def assert_same(one: Rollout, other: Rollout, rel: float):
    assert one.finished.keys() == other.finished.keys() and one.states.keys() == other.states.keys()
    for place, latent in one.finished.items():
        assert_close(f"latent {place}", latent, other.finished[place], rel)
    for place, state in one.states.items():
        for name in ("x", "children", "log_prob"):
            assert_close(
                f"{name} {place}", getattr(state, name), getattr(other.states[place], name), rel
            )


# --------------------------------------------------------------------------------------------- keys
def test_keys_are_distinct():
    """Every sample of 20 iterations of two runs with 3 prompts, 4 seeds, all steps and 6 children,
    and evaluation's."""
    ranges = [
        range(2),
        [EVAL_ITERATION, *range(20)],
        [0, 1, 3999],
        range(4),
        [INITIAL, *range(10)],
        range(6),
    ]
    keys = {noise_key(*place, (child,)) for *place, child in itertools.product(*ranges)}
    assert len(keys) == 2 * 21 * 3 * 4 * 11 * 6
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert {key < 0 for key in keys} == {True, False}, "all 64 bits are in use"


places = st.tuples(*[st.integers(-(2**40), 2**40)] * 6)


@given(places, places)
def test_a_key_is_a_function_of_its_place(one, other):
    assert (noise_key(*one[:5], one[5:]) == noise_key(*other[:5], other[5:])) == (one == other)


def test_what_is_no_branch_has_the_keys_of_branch_zero():
    """So that a deeper path is another key, and the keys of rows without branches stay what they
    were."""
    assert noise_key(1, 2, 3, 4, 5) == noise_key(1, 2, 3, 4, 5, (0,))
    assert (
        len(
            {
                noise_key(1, 2, 3, 4, 5, path)
                for path in ((0,), (1,), (1, 0), (0, 1), (1, 1), (1, 1, 0))
            }
        )
        == 6
    )


def test_evaluation_noise_follows_the_prompt_not_the_batch():
    whole = fixed_noise([0, 1, 2, 3], (4, 2), "cpu")
    assert torch.equal(fixed_noise([3, 1], (4, 2), "cpu"), whole[[3, 1]])
    assert not torch.equal(whole, fixed_noise([0, 1, 2, 3], (4, 2), "cpu", seed=1))
    assert len(whole.flatten(1).unique(dim=0)) == 4


# ---------------------------------------------------------------------------------------- scheduler
@pytest.mark.parametrize("sde", ["flow", "dance", "cps", "precise"])
def test_equals_one_row_at_a_time(sde):
    config = small_config(
        rollout={"sde": sde, "plan": {"children": 3, "branch_steps": [0, 1, 5, 8]}}
    )
    units = iteration_units([11, 4], 2)
    run = Rollout(config, units)
    finished, states = naive_trajectories(config, toy_velocity, units, GRID, SHAPE)
    assert run.finished.keys() == finished.keys() and run.states.keys() == states.keys()
    for place, latent in finished.items():
        assert_close(f"latent {place}", run.finished[place], latent, 1e-5)
    for place, (x, children) in states.items():
        assert_close(f"state {place}", run.states[place].x, x, 1e-5)
        assert_close(f"children {place}", run.states[place].children, children, 1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 1000])
@pytest.mark.parametrize("plan", ["tempflow", "flow_grpo", "mix_grpo"])
def test_batch_shape_changes_nothing(plan, micro_batch):
    group = "seed" if plan == "tempflow" else "prompt"
    config = small_config(
        rollout={"plan": plan_table(plan, seeds=2, children=2, branch_steps="all")},
        training={"advantage": {"over": group}},
    )
    units = iteration_units([5, 9, 2], 2)
    assert_same(
        Rollout(config, units, micro_batch=micro_batch),
        Rollout(config, units, micro_batch=7),
        rel=0,
    )


def test_ranks_share_nothing_change_nothing():
    """Two ranks' units, each alone, are the units of one rank; and children may be fewer without
    changing the others."""
    config = small_config(rollout={"plan": {"children": 4}})
    units = iteration_units([5, 9, 2], 2)
    whole, shares = Rollout(config, units), [Rollout(config, units[rank::2]) for rank in range(2)]
    for share in shares:
        for place, latent in share.finished.items():
            assert torch.equal(latent, whole.finished[place])
        for place, state in share.states.items():
            assert torch.equal(state.children, whole.states[place].children)
    assert sum(len(share.finished) for share in shares) == len(whole.finished)
    fewer = Rollout(small_config(rollout={"plan": {"children": 2}}), units)
    assert torch.equal(fewer.states[3, 4].children, whole.states[3, 4].children[:2])


def test_noise_differs_wherever_the_sample_does():
    """Iterations, prompts, seeds, steps and children: no two samples share their noise."""
    config = small_config(rollout={"plan": {"children": 3, "branch_steps": "all"}})
    units = iteration_units([5, 9], 2)
    seen = []
    for iteration in (0, 1):
        run = Rollout(
            config, units, velocity=lambda x, sigma, units: torch.zeros_like(x), iteration=iteration
        )
        scalars = [step_scalars("flow", GRID, k, 0.7) for k in range(9)]
        for (_, k), state in run.states.items():
            a, _, tau = scalars[k]
            seen.append((state.children - a * state.x) / tau)
        seen += [run.states[unit.index, 0].x[None] for unit in units]
    noise = torch.cat(seen).flatten(1)
    assert len(noise) == 2 * (4 * 9 * 3 + 4)
    distance = torch.cdist(noise, noise) + 10 * torch.eye(len(noise))
    assert distance.min() > 0.5
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("units", [1, 3])
def test_forwards_are_those_of_the_cost_table(units):
    """docs/method.md: 10 + 6 * 45 = 280 forwards per (prompt, seed) for T = 10, B = 6, branch
    steps 0 .. 8."""
    config = small_config(rollout={"plan": {"children": 6, "branch_steps": "all"}})
    rows = []

    def counted(x, sigma, units):
        rows.append(len(x))
        return toy_velocity(x, sigma, units)

    run = Rollout(config, iteration_units([3], units), velocity=counted, micro_batch=48)
    assert sum(rows) == run.stats.forwards == run.told == 280 * units
    assert len(rows) == run.stats.batches and max(rows) <= 48
    assert len(run.finished) == (1 + 9 * 6) * units


def test_rows_at_different_steps_share_forwards():
    """3 units give 18 children a step, which do not fill a batch of 24: step by step it would take
    10 + 45 forwards."""
    config = small_config(rollout={"plan": {"children": 6, "branch_steps": "all"}})
    run = Rollout(config, iteration_units([1, 2, 3], 1), micro_batch=24)
    assert run.stats.batches <= 280 * 3 / 24 + 10, (
        "all forwards are full but those of the first and last rows"
    )


@pytest.mark.parametrize("suffix", [None, Suffix(), Suffix(stride=3, exact_steps=1)])
@pytest.mark.parametrize(("units", "micro_batch"), [(1, 24), (3, 48), (8, 48), (8, 100)])
def test_no_row_is_left_behind_to_end_in_small_batches(units, micro_batch, suffix):
    """No more batches than the forwards fill, but for the first steps, when there are trunks
    alone."""
    config = small_config(rollout={"plan": {"children": 6, "branch_steps": "all"}})
    config.rollout.suffix = suffix
    run = Rollout(config, iteration_units([3], units), micro_batch=micro_batch)
    assert run.stats.batches <= -(-run.stats.forwards // micro_batch) + 4


@pytest.mark.parametrize("suffix", [None, Suffix()])
def test_lanes_change_nothing(policy, suffix):
    """Three units in two threads against one after another: the same states and counts; and from
    run to run the same bits."""

    def collect(lanes):
        config = small_config(
            data={"prompts_per_iteration": 3}, rollout={"plan": {"seeds": 1}, "lanes": lanes}
        )
        config.rollout.suffix = suffix
        return Iteration(policy, config, prompt_ids=(0, 1, 2))

    one, two, again = collect(1), collect(2), collect(2)
    assert np.array_equal(two.rewards, again.rewards)
    # a picture's byte may round otherwise
    assert_close("rewards", torch.tensor(two.rewards), torch.tensor(one.rewards), 1e-3)
    assert (one.scored.images, one.rolled.stats.forwards) == (
        two.scored.images,
        two.rolled.stats.forwards,
    )
    for a, b in zip(one.states, two.states, strict=True):
        assert (a.unit, a.step) == (b.unit, b.step)
        assert_close("children", b.children, a.children, 1e-5)
        assert_close("log_prob", b.log_prob, a.log_prob, 1e-5)


def test_chain_of_a_row_with_noise_everywhere():
    """flow_grpo: each state is the child of the one before, with that step's noise; the last step
    is the ODE's."""
    config = small_config(
        rollout={"plan": {"type": "flow_grpo", "branch_steps": "all", "seeds": 3}},
        training={"advantage": {"over": "prompt"}},
    )
    units = iteration_units([5, 9], 3)
    run = Rollout(config, units)
    assert run.stats.forwards == 10 * len(units)
    assert run.states.keys() == {(unit.index, k) for unit in units for k in range(9)}
    for unit in units:
        for k in range(9):
            state = run.states[unit.index, k]
            assert state.children.shape == (1, *SHAPE)
            a, b, tau = step_scalars("flow", GRID, k, 0.7)
            v = toy_velocity(state.x[None], GRID[k : k + 1], [unit])[0]
            expected = a * state.x + b * v + tau * step_noise(config, unit, k, 0, SHAPE)
            assert_close(f"unit {unit.index} step {k}", state.children[0], expected, 1e-6)
            if k < 8:
                assert torch.equal(state.children[0], run.states[unit.index, k + 1].x)
        x = run.states[unit.index, 8].children[0]
        v = toy_velocity(x[None], GRID[9:10], [unit])[0]
        assert_close("last step", run.finished[unit.index, None, 0], x - GRID[9] * v, 1e-6)


def test_mix_grpo_takes_noise_inside_its_window_only():
    config = small_config(
        rollout={"plan": {"type": "mix_grpo", "seeds": 2, "window": 3, "every": 2}},
        training={"advantage": {"over": "prompt"}},
    )
    windows = [config.plan().steps(iteration) for iteration in range(16)]
    assert windows[:5] == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [1, 2, 3], [2, 3, 4]]
    assert windows[13] == [6, 7, 8] and windows[14] == [
        0,
        1,
        2,
    ], "the window starts over before the last step"
    run = Rollout(config, iteration_units([5], 2), iteration=4)
    assert {k for _, k in run.states} == {2, 3, 4} and run.stats.forwards == 20
    unit = run.forest.rows[0].unit
    noise = step_noise(config, unit, INITIAL, 0, SHAPE, iteration=4)
    assert_close(
        "state at the window's start",
        run.states[unit.index, 2].x,
        naive_ode(noise, unit, 0, 2),
        1e-5,
    )
    last = run.states[unit.index, 4].children[0]
    assert_close("end", run.finished[unit.index, None, 0], naive_ode(last, unit, 5, 10), 1e-5)


def test_samples_are_the_odes():
    """Every row is a slot of an objective that learns from finished latents; others are refused."""
    rollout = {"plan": {"type": "samples", "seeds": 3}}
    config = small_config(
        rollout=rollout, training={"advantage": {"over": "prompt"}, "objective": "nft"}
    )
    run = Rollout(config, iteration_units([5], 3))
    assert run.stats.forwards == 30 and not run.states
    for unit in (row.unit for row in run.forest.rows):
        noise = step_noise(config, unit, INITIAL, 0, SHAPE)
        assert_close("end", run.finished[unit.index, None, 0], naive_ode(noise, unit, 0, 10), 1e-5)
    with pytest.raises(
        UserError,
        match='rollout.plan: samples takes no noise.*training.objective must learn .*as "nft" does',
    ):
        small_config(rollout=rollout, training={"advantage": {"over": "prompt"}})


def naive_ode(x, unit, first, last):
    for k in range(first, last):
        x = x + (GRID[k + 1] - GRID[k]) * toy_velocity(x[None], GRID[k : k + 1], [unit])[0]
    return x


def test_without_units_there_is_nothing_to_do():
    run = Rollout(small_config(), [])
    assert run.states == {} and run.finished == {} and run.stats.forwards == 0


# --------------------------------------------------------------------------------------- real model
@pytest.fixture(scope="module")
def model(policy):
    """(velocity, sigmas, latent shape) of the shipped model at 32 x 96."""
    cache = EmbeddingCache(policy)

    def velocity(x, sigma, units):
        conditioning = cache.get(examples([PROMPTS[unit.prompt_id] for unit in units]))
        return policy.velocity(policy.transformer, x, sigma, conditioning, Size(32, 96), 0.0)

    return velocity, policy.sigmas(6, Size(32, 96)), policy.latent_shape(Size(32, 96))


@pytest.fixture(scope="module")
def model_config():
    return small_config(rollout={"num_steps": 6, "plan": {"children": 2, "branch_steps": [0, 3]}})


def test_model_rollout_equals_one_row_at_a_time(model, model_config):
    velocity, sigmas, shape = model
    units = iteration_units([0, 2], 1)
    run = Rollout(model_config, units, velocity=velocity, sigmas=sigmas, shape=shape, micro_batch=5)
    with torch.no_grad():
        finished, states = naive_trajectories(model_config, velocity, units, sigmas, shape)
    for place, latent in finished.items():
        assert_close(f"latent {place}", run.finished[place], latent, 1e-5)
    for place, (x, children) in states.items():
        assert_close(f"state {place}", run.states[place].x, x, 1e-5)
        assert_close(f"children {place}", run.states[place].children, children, 1e-5)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_model_rollout_does_not_depend_on_the_batch(model, model_config, micro_batch):
    velocity, sigmas, shape = model
    units = iteration_units([0, 2], 1)
    runs = [
        Rollout(
            model_config, units, velocity=velocity, sigmas=sigmas, shape=shape, micro_batch=size
        )
        for size in (micro_batch, 48)
    ]
    assert_same(*runs, rel=1e-5)


# ------------------------------------------------------------------------------------- branch steps
@given(st.integers(1, 9), st.integers(0, 1000), st.integers(0, 50))
def test_random_branch_steps_are_spread_and_seeded(count, iteration, seed):
    config = small_config(
        rollout={"plan": {"branch_steps": {"random": count}}}, training={"seed": seed}
    )
    steps = config.plan().steps(iteration)
    assert steps == config.plan().steps(iteration) and all(type(k) is int for k in steps)
    assert len(steps) == count and steps == sorted(set(steps))
    for n, k in enumerate(steps):  # one in each of `count` strata whose sizes differ by at most one
        assert (9 // count) * n <= k <= -(-9 // count) * (n + 1) - 1


def test_random_branch_steps_reach_every_step():
    config = small_config(rollout={"plan": {"branch_steps": {"random": 3}}})
    drawn = [tuple(config.plan().steps(iteration)) for iteration in range(100)]
    assert {k for steps in drawn for k in steps} == set(range(9))
    assert all(steps[0] <= 2 < steps[1] <= 5 < steps[2] for steps in drawn)
    assert len(set(drawn)) > 15, "27 are possible"
    other = small_config(rollout={"plan": {"branch_steps": {"random": 3}}}, training={"seed": 1})
    assert drawn != [tuple(other.plan().steps(iteration)) for iteration in range(100)]


def test_units_are_numbered_prompt_by_prompt():
    units = iteration_units([7, 3], 2)
    assert [(u.index, u.prompt, u.prompt_id, u.seed) for u in units] == [
        (0, 0, 7, 0),
        (1, 0, 7, 1),
        (2, 1, 3, 0),
        (3, 1, 3, 1),
    ]
