"""Group-normalized advantages: by hand, against a plain loop over groups, and by property."""

import itertools

import numpy as np
import pytest
from engine_cases import dense
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tempflow.advantages.gdpo import Gdpo
from tempflow.advantages.group import Group

NAN = float("nan")
NEVER = 1e9  # a clip that is out of reach
GROUPS = ("seed", "prompt")


def advantages(rewards, *, group, global_std, clip, applies=None):
    """applies: R times bool [P], which rewards are for a prompt."""
    weights = None if applies is None else [1.0] * len(applies)
    return dense(
        Group(group, clip, global_std), rewards, [rewards] * len(applies or []), weights, applies
    )


def compute(rewards, group="seed", global_std=False, clip=5.0):
    return advantages(np.array(rewards), group=group, global_std=global_std, clip=clip)


def members(shape, group):
    """Index arrays of each group's rewards."""
    prompts, seeds, steps, _ = shape
    if group == "seed":
        return [
            np.s_[p, s, k, :]
            for p, s, k in itertools.product(range(prompts), range(seeds), range(steps))
        ]
    return [np.s_[p, :, k, :] for p, k in itertools.product(range(prompts), range(steps))]


def by_loop(rewards, group, global_std, clip):
    everything = rewards[np.isfinite(rewards)]
    values = np.zeros(rewards.shape)
    for place in members(rewards.shape, group):
        r = rewards[place]
        scored = r[np.isfinite(r)]
        if len(scored) and scored.min() < scored.max():
            std = everything.std() if global_std else scored.std()
            a = np.clip((r - scored.mean()) / (std + 1e-4), -clip, clip)
            values[place] = np.where(np.isfinite(r), a, 0)
    return values


# ------------------------------------------------------------------------------------------ by hand
def test_seed_group():
    # mean 2, population std sqrt(2/3)
    found = compute([[[[1.0, 2.0, 3.0]]]])
    a = 1 / (np.sqrt(2 / 3) + 1e-4)
    np.testing.assert_allclose(found.values, [[[[-a, 0, a]]]], rtol=1e-6)
    assert found.values.dtype == np.float32
    assert found.valid.all() and not found.zero_spread.any()
    np.testing.assert_allclose(found.spread[0], np.sqrt(2 / 3))


def test_groups_keep_apart_what_differs():
    """Two seeds of one prompt at different levels: seed groups see their own spread, the prompt
    group both levels."""
    rewards = [[[[0.0, 1.0]], [[10.0, 11.0]]]]
    a = 0.5 / (0.5 + 1e-4)
    np.testing.assert_allclose(compute(rewards, "seed").values.ravel(), [-a, a, -a, a], rtol=1e-6)
    std = np.sqrt((5.5**2 + 4.5**2) / 2)
    expected = np.array([-5.5, -4.5, 4.5, 5.5]) / (std + 1e-4)
    np.testing.assert_allclose(compute(rewards, "prompt").values.ravel(), expected, rtol=1e-6)


def test_steps_and_prompts_are_never_mixed():
    # two prompts, one seed, two steps: four groups whose spreads are 1, 2, 3 and 4 times the
    # first's
    rewards = [[[[0.0, 2.0], [5.0, 9.0]]], [[[1.0, 7.0], [3.0, 11.0]]]]
    for group in GROUPS:
        found = compute(rewards, group)
        expected = [[[[-s / (s + 1e-4), s / (s + 1e-4)] for s in row]] for row in ([1, 2], [3, 4])]
        np.testing.assert_allclose(found.values, expected, rtol=1e-6)
        # means over prompts, per step
        np.testing.assert_allclose(list(found.spread.values()), [2, 3])


def test_global_std_divides_by_that_of_the_whole_batch():
    rewards = [[[[0.0, 2.0]]], [[[10.0, 14.0]]]]
    std = np.std([0, 2, 10, 14])
    expected = np.array([-1, 1, -2, 2]) / (std + 1e-4)
    np.testing.assert_allclose(
        compute(rewards, global_std=True).values.ravel(), expected, rtol=1e-6
    )


def test_masked_rewards_leave_their_group():
    found = compute([[[[1.0, NAN, 3.0, 100.0]]], [[[NAN, 1.0, np.inf, 3.0]]]])
    scored = np.array([1.0, 3.0, 100.0])
    expected = (scored - scored.mean()) / (scored.std() + 1e-4)
    np.testing.assert_allclose(
        found.values[0, 0, 0], [expected[0], 0, expected[1], expected[2]], rtol=1e-6
    )
    a = 1 / (1 + 1e-4)
    np.testing.assert_allclose(found.values[1, 0, 0], [0, -a, 0, a], rtol=1e-6)
    assert found.valid.tolist() == [[[[True, False, True, True]]], [[[False, True, False, True]]]]


def test_global_std_leaves_masked_rewards_out():
    std = np.std([0.0, 2.0, 4.0, 4.0])
    found = compute([[[[0.0, 2.0, NAN]]], [[[4.0, NAN, 4.0]]]], global_std=True)
    a = 1 / (std + 1e-4)
    np.testing.assert_allclose(found.values.ravel(), [-a, a, 0, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("global_std", [False, True])
def test_no_spread_is_exactly_zero(global_std):
    """0.1 has no exact mean of three: rounding must not become an advantage."""
    found = compute(
        [[[[0.1, 0.1, 0.1]]], [[[0.1, NAN, 0.3]]], [[[NAN, 0.7, NAN]]], [[[NAN] * 3]]],
        global_std=global_std,
    )
    assert (found.values[[0, 2, 3]] == 0).all()
    assert (found.values[1, 0, 0] != 0).tolist() == [True, False, True]
    assert found.zero_spread.ravel().tolist() == [True, False, True, True]


def test_spread_is_a_mean_over_groups_that_have_rewards():
    found = compute(
        [[[[0.0, 2.0], [NAN, NAN]]], [[[0.0, 6.0], [NAN, NAN]]], [[[NAN, NAN], [NAN, NAN]]]]
    )
    np.testing.assert_allclose(list(found.spread.values()), [2.0, NAN])


def test_clip():
    rewards = [[[[0.0] * 63 + [1.0]]]]
    free, clipped = compute(rewards, clip=NEVER).values, compute(rewards, clip=5.0).values
    assert free.max() > 7
    np.testing.assert_allclose(clipped, np.clip(free, -5, 5))
    assert clipped.max() == 5


# -------------------------------------------------------------------------------------- by property
numbers = st.integers(-400, 400).map(lambda n: n / 8)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(2, 5))
batches = shapes.flatmap(
    lambda shape: arrays(np.float64, shape, elements=numbers | st.just(NAN), fill=st.nothing())
)
options = {"group": st.sampled_from(GROUPS), "global_std": st.booleans()}


@given(rewards=batches, clip=st.sampled_from([0.5, 5.0, NEVER]), **options)
def test_equals_a_loop_over_groups(rewards, group, global_std, clip):
    found = advantages(rewards, group=group, global_std=global_std, clip=clip)
    np.testing.assert_allclose(
        found.values, by_loop(rewards, group, global_std, clip), rtol=1e-5, atol=1e-9
    )


@given(rewards=batches, shift=numbers, **options)
def test_a_shift_of_all_rewards_changes_nothing(rewards, shift, group, global_std):
    one = advantages(rewards, group=group, global_std=global_std, clip=5.0)
    other = advantages(rewards + shift, group=group, global_std=global_std, clip=5.0)
    np.testing.assert_allclose(one.values, other.values, rtol=1e-5, atol=1e-6)
    assert (one.zero_spread == other.zero_spread).all()


@given(rewards=batches, data=st.data(), **options)
def test_permuted_rewards_have_permuted_advantages(rewards, data, group, global_std):
    """Children within a group trade places freely; so do whole prompts, and seeds."""
    orders = [data.draw(st.permutations(range(n))) for n in rewards.shape]
    orders[2] = range(rewards.shape[2])
    permute = np.ix_(*orders)
    whole = advantages(rewards, group=group, global_std=global_std, clip=5.0).values
    permuted = advantages(rewards[permute], group=group, global_std=global_std, clip=5.0).values
    np.testing.assert_allclose(permuted, whole[permute], rtol=1e-5, atol=1e-6)


@given(rewards=batches, **options)
def test_mean_of_a_group_is_zero_before_clipping(rewards, group, global_std):
    found = advantages(rewards, group=group, global_std=global_std, clip=NEVER)
    for place in members(rewards.shape, group):
        assert abs(found.values[place].sum()) <= 1e-4 * max(1, np.abs(found.values[place]).max())


@given(rewards=batches, **options)
def test_masked_children_have_no_advantage(rewards, group, global_std):
    found = advantages(rewards, group=group, global_std=global_std, clip=5.0)
    assert (found.valid == np.isfinite(rewards)).all()
    assert (found.values[~found.valid] == 0).all() and np.isfinite(found.values).all()


# ---------------------------------------------------------------------------------- several rewards
def decoupled(parts, weights, group="seed", global_std=False, clip=NEVER):
    parts = [np.asarray(part, dtype=np.float64) for part in parts]
    total = sum(w * part for w, part in zip(weights, parts, strict=True))
    return dense(Gdpo(group, clip, global_std), total, parts, weights)


def gdpo_by_loop(parts, weights, group, global_std):
    """Equations 4 to 6 of GDPO over the pictures that every reward has scored."""
    scored = np.all(np.isfinite(parts), axis=0)
    one_by_one = [by_loop(np.where(scored, part, NAN), group, global_std, NEVER) for part in parts]
    total = sum(w * one for w, one in zip(weights, one_by_one, strict=True))
    batch = total[scored]
    return (
        np.where(scored, (total - batch.mean()) / (batch.std() + 1e-4), 0)
        if len(batch)
        else np.zeros(total.shape)
    )


@st.composite
def several(draw):
    shape, count = draw(shapes), draw(st.integers(1, 3))
    parts = [
        draw(arrays(np.float64, shape, elements=numbers | st.just(NAN), fill=st.nothing()))
        for _ in range(count)
    ]
    return parts, [draw(st.sampled_from([-2.0, 0.3, 1.0])) for _ in range(count)]


@given(case=several(), **options)
def test_decoupled_equals_gdpo(case, group, global_std):
    found = decoupled(*case, group, global_std).values
    np.testing.assert_allclose(found, gdpo_by_loop(*case, group, global_std), rtol=1e-5, atol=1e-7)


def test_decoupled_keeps_apart_what_the_sum_collapses():
    """GDPO's own example: of two children one has both rewards, or one of two; the sum sees the
    same advantage."""
    both, one = [[[[0.0, 1.0], [0.0, 1.0]]]], [[[[0.0, 1.0], [0.0, 0.0]]]]
    summed = compute(np.add(both, one)).values[0, 0]
    np.testing.assert_allclose(summed[0], summed[1], rtol=2e-4)
    apart = decoupled([both, one], [1, 1]).values[0, 0]
    np.testing.assert_allclose(apart[0], 2 * apart[1], rtol=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_decoupled_scale_of_a_reward_does_not_count(group):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 2, 3, 4, 5))
    found = [decoupled([one, scale * other], [0.7, 0.3], group).values for scale in (1e3, 1e6)]
    np.testing.assert_allclose(*found, atol=1e-5)
    assert abs(found[0].std() - 1) < 1e-3


def test_decoupled_masks_a_picture_that_any_reward_failed():
    one, other = [[[[1.0, 2.0, NAN, 9.0]]]], [[[[3.0, 1.0, 5.0, NAN]]]]
    found = decoupled([one, other], [1.0, 3.0])
    assert found.valid.tolist() == [[[[True, True, False, False]]]]
    # as if the last two had never been drawn
    np.testing.assert_allclose(found.values, [[[[1, -1, 0, 0]]]], rtol=1e-3)


def test_decoupled_group_is_flat_only_where_every_reward_is():
    """In the first group the sum is constant and its parts are not; in the second nothing
    differs."""
    one, other = [[[[0.0, 1.0], [0.1, 0.1]]]], [[[[1.0, 0.0], [0.3, 0.3]]]]
    found = decoupled([one, other], [2.0, 2.0])
    assert found.zero_spread.ravel().tolist() == [False, True]
    assert found.spread == {0: 0, 1: 0}  # of the sum
    one_flat = decoupled([one, [[[[0.7, 0.7], [0.7, 0.7]]]]], [1.0, 1.0])
    assert (one_flat.values[0, 0, 0] != 0).all() and (one_flat.values[0, 0, 1] == 0).all()


def test_decoupled_clip():
    rewards = [[[[0.0] * 63 + [1.0]]]]
    assert decoupled([rewards], [1.0]).values.max() > 7
    assert decoupled([rewards], [1.0], clip=5.0).values.max() == 5
