"""What a reward is worth before it is compared, the scale that it is divided by, and the anchor: by
hand, and with rewards that failed."""

import numpy as np
import pytest
from engine_cases import Iteration, dense, small_config

from tempflow.advantages.gdpo import Gdpo
from tempflow.advantages.group import Group
from tempflow.advantages.utilities import TYPES, make
from tempflow.errors import UserError
from tempflow.run.diversity import distance_to_others
from tempflow.types import Rewards

NAN = float("nan")
EVERY = [make(kind) for kind in TYPES]


def of(rewards, utility=None, **options):
    """Advantages [B] of one group."""
    return dense(Group(utility=utility, **options), [[[rewards]]]).values.ravel()


# ---------------------------------------------------------------------------------------- utilities
WORKED = [  # utility, rewards, worth, advantages
    ("cvar", [0, 1, 2, 3], [0, 2, 2, 2], [-1.73, 0.58, 0.58, 0.58]),
    ("superquantile", [0, 1, 2, 3], [2, 2, 4, 6], [-0.90, -0.90, 0.30, 1.51]),
    ("win_rate", [0.1, 0.1, 0.5, 0.9], [1 / 6, 1 / 6, 2 / 3, 1], None),
    ({"type": "mean_variance", "coef": 0.5}, [0, 1, 2, 3], [-1.125, 0.875, 1.875, 1.875], None),
    ({"type": "cvar", "level": 0.25}, [3, 0, 2, 1], [0, 0, 0, 0], [0, 0, 0, 0]),
]


@pytest.mark.parametrize("utility, rewards, worth, advantages", WORKED)
def test_worked_numbers(utility, rewards, worth, advantages):
    labels = np.zeros(len(rewards), dtype=int)
    np.testing.assert_allclose(make(utility)(np.array(rewards, dtype=float), labels), worth)
    if advantages:
        np.testing.assert_allclose(of(rewards, utility), advantages, atol=6e-3)


@pytest.mark.parametrize("utility", EVERY, ids=list(TYPES))
def test_failed_rewards_stay_masked_and_change_nothing(utility):
    """Two groups, interleaved, without and with rewards that failed; a group of which all
    failed."""
    rewards, labels = np.array([0.3, 0.9, 0.1, 0.4, 0.3, 0.2]), np.array([0, 1, 0, 1, 0, 1])
    far = np.array([0.1, 0.2, 0.3, 0.4, NAN, 0.6])
    few = utility(rewards, labels, far)
    more = utility(np.r_[rewards, NAN, NAN, NAN], np.r_[labels, 0, 1, 2], np.r_[far, NAN, 0.5, NAN])
    np.testing.assert_array_equal(more[:6], few)
    assert np.isfinite(few).all() and np.isnan(more[6:]).all()
    alone = utility(rewards[1::2], labels[1::2], far[1::2])
    np.testing.assert_array_equal(few[1::2], alone)


def test_a_quantile_of_the_batch_weighs_groups():
    """Group 1 lies above the median of all: under CVaR nothing of it counts. Its spread is reported
    all the same."""
    rewards = [[[[0.0, 0.2, 0.4]]], [[[0.6, 0.8, 1.0]]]]
    found = dense(Group(utility={"type": "cvar", "over": "batch"}, global_std=True), rewards)
    assert (found.values[1] == 0).all() and found.values[0, 0, 0, 0] < 0 < found.values[0, 0, 0, 2]
    assert not found.zero_spread.any() and found.spread[0] == pytest.approx(0.2 * (2 / 3) ** 0.5)


def test_a_quantile_of_the_batch_is_of_prompts_with_the_same_rewards():
    """Prompts 0 and 1 have one reward, 2 another at a hundred times the level."""
    rewards = np.array([[[[0.0, 0.2, 0.4]]], [[[0.6, 0.8, 1.0]]], [[[10.0, 20.0, 30.0]]]])
    applies = [[True, True, False], [False, False, True]]
    parts = [np.where(np.reshape(one, (3, 1, 1, 1)), rewards, 0.0) for one in applies]
    for how in (Group, Gdpo):
        found = dense(
            how(utility={"type": "cvar", "over": "batch"}), rewards, parts, [1.0, 1.0], applies
        )
        assert (found.values[1] == 0).all() and (found.values[0] != 0).any()
        low, middle, high = found.values[2, 0, 0]
        assert low < 0 < middle == high, "10, 20 and 30 have the median 20"


def test_gdpo_takes_the_utility_of_each_reward():
    one, other = np.array([[[[0.0, 1.0, 2.0, 3.0]]]]), np.array([[[[9.0, 1.0, 5.0, 5.0]]]])
    found = dense(Gdpo(utility="win_rate"), one + other, [one, other], [1.0, 2.0]).values.ravel()
    ranks = [np.array([0, 1, 2, 3]) / 3, np.array([1, 0, 0.5, 0.5])]
    total = sum(w * (r - r.mean()) / (r.std() + 1e-4) for w, r in zip((1, 2), ranks))
    np.testing.assert_allclose(found, total / (total.std() + 1e-4), rtol=1e-5)


# ------------------------------------------------------------------------------------ scale, anchor
def test_scales_by_hand():
    np.testing.assert_allclose(of([-1, 0, 1], scale="quasi_norm"), [-0.4204, 0, 0.4204], atol=1e-4)
    np.testing.assert_allclose(of([1, 2, NAN, 6], scale="none"), [-2, -1, 0, 3])
    np.testing.assert_allclose(
        of([-2, NAN, 0, 2], scale="quasi_norm"), of([-2, 0, 2], scale="quasi_norm")[[0, 1, 1, 2]]
    )
    assert (of([0.1, 0.1, 0.1], scale="quasi_norm") == 0).all()


@pytest.mark.parametrize("how", [Group, Gdpo])
def test_the_anchor(how):
    """Without spread the reward is left, and still reported as without spread; with one it is a
    constant."""
    rewards = np.array([[[[1.0, 1.0, NAN, 1.0]]], [[[0.0, 2.0, 2.0, 0.0]]]])
    plain, found = (dense(how(anchor=anchor), rewards, [rewards], [1.0]) for anchor in (0.0, 0.5))
    np.testing.assert_allclose(found.values[0, 0, 0], [0.5, 0.5, 0, 0.5])
    assert found.zero_spread.tolist() == [True, False]
    np.testing.assert_allclose(found.values[1] - plain.values[1], [[[0, 1, 1, 0]]], atol=1e-6)


# ------------------------------------------------------------------------------------------ novelty
def test_distance_to_the_others_by_hand():
    """Points of two elements on a line; two groups, an image that is missing, one that is alone."""
    points = np.array(
        [[0, 0], [3, 3], [6, 6], [NAN, NAN], [1, 1], [5, 5], [7, 7]], dtype=np.float32
    )
    found = distance_to_others(points, np.array([0, 0, 0, 0, 1, 1, 2]))
    np.testing.assert_allclose(found, [4.5, 3, 4.5, NAN, 4, 4, NAN])


def test_novelty_by_hand():
    given = Rewards(np.array([0.5, 0.5, NAN]), {}, {}, {}, novelty=np.array([0.1, 0.3, 0.2]))
    worth = make({"type": "novelty", "coef": 2.0})(
        given.total, np.zeros(3, dtype=int), given.novelty
    )
    np.testing.assert_allclose(worth, [0.7, 1.1, NAN])


@pytest.mark.parametrize("over", ["seed", "prompt"])
def test_novelty_of_a_rollout(policy, over):
    """The mean over the group of root mean square differences of thumbnails; nothing of it where
    nobody asks."""
    rollout = {"num_steps": 3, "plan": {"seeds": 2, "children": 3, "branch_steps": [0, 1]}}
    run = Iteration(
        policy,
        small_config(rollout=rollout, training={"advantage": {"over": over, "utility": "novelty"}}),
    )
    images, layout = run.rolled.images, run.rolled.layout
    seen = {
        run.rolled.forest.numbers[n]: one
        for n, one in zip(images.rows, images.thumbnails, strict=True)
    }
    labels, expected = layout.slots.groups(over), []
    for slot, (row,) in enumerate(layout.slots.leaves):
        others = [
            layout.slots.leaves[k][0] for k in np.flatnonzero(labels == labels[slot]) if k != slot
        ]
        expected.append(
            np.mean(
                [np.sqrt(np.mean((seen[row].astype(float) - seen[one]) ** 2)) for one in others]
            )
        )
    np.testing.assert_allclose(run.scored.rewards.novelty, expected, rtol=1e-6)
    assert min(expected) > 0.01 and len(others) == {"seed": 2, "prompt": 5}[over]
    plain = run.session.variant(small_config(rollout=rollout))
    from tempflow.training.image_distances import novelty

    assert novelty(plain, run.rolled) is None
    assert not np.allclose(
        run.advantages().values, plain.advantage(layout.slots, run.scored.rewards).values
    )


# -------------------------------------------------------------------------------------- in a config
@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"utility": "cvra"},
            "training.advantage.utility: expected null, cvar, mean_variance, .*got 'cvra'",
        ),
        ({"utility": {"level": 0.5}}, "training.advantage.utility: expected null, cvar"),
        (
            {"utility": {"type": "cvar", "level": 1.0}},
            "training.advantage.utility.level: expected a number above 0 and below 1, got 1.0",
        ),
        (
            {"utility": {"type": "cvar", "over": "prompt"}},
            "training.advantage.utility.over: expected 'group' or 'batch', got 'prompt'",
        ),
        (
            {"utility": {"type": "win_rate", "level": 0.5}},
            "training.advantage.utility.level: no such option",
        ),
        (
            {"scale": "quasi_norm", "global_std": True},
            "training.advantage.global_std: true divides by a standard deviation",
        ),
        ({"anchor": -0.5}, "training.advantage.anchor: expected a number at least 0"),
    ],
)
@pytest.mark.parametrize("kind", ["group", "gdpo"])
def test_a_config_that_cannot_work(kind, options, words):
    with pytest.raises(UserError, match=words):
        small_config(training={"advantage": {"type": kind, **options}})
