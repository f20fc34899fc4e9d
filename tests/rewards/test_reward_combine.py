"""The weighted sum of rewards, by hand and by property."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tempflow.rewards import RewardSpec, Scores, combine

NAN = float("nan")


def scores(**parts):
    return {name: Scores(np.array(values, np.float32)) for name, values in parts.items()}


def test_by_hand():
    specs = [RewardSpec("a", 0.5), RewardSpec("b", -2.0)]
    combined = combine(scores(a=[1, 0, NAN, 4], b=[1, 3, 2, NAN]), specs)
    assert combined.values.dtype == np.float32
    assert np.array_equal(combined.values, np.array([-1.5, -6, NAN, NAN]), equal_nan=True)
    assert np.array_equal(combined.parts["a"], np.array([1, 0, NAN, 4]), equal_nan=True)


def test_watched_reward_masks_nothing():
    specs = [RewardSpec("a", 1.0), RewardSpec("watched", 0.0)]
    combined = combine(scores(a=[1, 2], watched=[NAN, 7]), specs)
    assert combined.values.tolist() == [1, 2]
    assert np.isnan(combined.parts["watched"][0])


value = st.floats(-100, 100, width=32) | st.just(NAN)


@given(st.lists(st.tuples(value, value), min_size=1), st.floats(0.1, 10), st.floats(-10, -0.1))
def test_nan_exactly_where_a_part_is(rows, first, second):
    a, b = zip(*rows)
    combined = combine(scores(a=a, b=b), [RewardSpec("a", first), RewardSpec("b", second)]).values
    assert np.array_equal(np.isnan(combined), np.isnan(a) | np.isnan(b))
    expected = first * np.array(a, np.float64) + second * np.array(b, np.float64)
    np.testing.assert_allclose(combined, expected, rtol=1e-6, atol=1e-5)
