"""Prompts that say which rewards are for them: others are not asked about them, and do not count as
failed."""

import json

import numpy as np
import pytest
from engine_cases import dense, dense_slots
from hypothesis import given
from hypothesis import strategies as st

from tempflow.advantages.gdpo import Gdpo
from tempflow.advantages.group import Group
from tempflow.config import Curation as Settings
from tempflow.data.curation import Curation
from tempflow.data.prompts import PromptOrder, load_prompts
from tempflow.errors import UserError
from tempflow.rewards import (
    RewardPool,
    RewardSpec,
    check_asked,
    check_prompts,
    combine,
    fits,
    kinds_of,
    parse_rewards,
)
from tempflow.rewards.pool import NOT_FINITE

WORDS, VALUES, WEIGHTS = ("red", "green", "blue"), (2.0, 30.0, 400.0), (1.0, -0.5, 0.0)
SPECS = [
    RewardSpec(w, weight, {"word": w, "value": x}, "faulty_rewards:only")
    for w, x, weight in zip(WORDS, VALUES, WEIGHTS)
]

subsets = st.sets(st.sampled_from(WORDS), min_size=1).map(sorted)


@given(st.lists(st.tuples(subsets | st.none(), st.booleans()), min_size=1, max_size=6))
def test_each_image_is_scored_by_its_prompts_rewards(rows):
    """The sum is over those alone; an image that is not finite is asked about by none and fails all
    of them."""
    named = [list(WORDS) if one is None else one for one, _ in rows]
    metadata = [{} if one is None else {"rewards": one} for one, _ in rows]
    finite = np.array([ok for _, ok in rows])
    with RewardPool(SPECS, workers=0) as pool:
        ticket = pool.submit(
            np.zeros((len(rows), 8, 8, 3), np.uint8),
            [" ".join(n) for n in named],
            metadata,
            finite=finite,
        )
        (scores,) = pool.gather([ticket])
        assert pool.failures == 0
    found = combine(scores, SPECS)
    for i, (names, ok) in enumerate(zip(named, finite)):
        for word, value in zip(WORDS, VALUES):
            assert found.applies[word][i] == (word in names)
            assert (
                found.parts[word][i] == value
                if ok and word in names
                else np.isnan(found.parts[word][i])
            )
            details = scores[word].details
            assert (details is not None and details[i] == NOT_FINITE) == (word in names and not ok)
        total = sum(w * x for word, w, x in zip(WORDS, WEIGHTS, VALUES) if word in names)
        trained = any(word in names and w for word, w in zip(WORDS, WEIGHTS))
        assert found.values[i] == total if ok or not trained else np.isnan(found.values[i])


@pytest.mark.parametrize(
    "named, words",
    [
        (["gren"], ["'gren'", "did you mean 'green'?", "red, green, blue"]),
        (["clip", "red"], ["'clip'", "red, green, blue"]),
        ([], ["list of reward names"]),
        ("red", ["list of reward names", "'red'"]),
        ([1], ["list of reward names"]),
        ({"red": 1}, ["list of reward names"]),
        (["blue"], ["weight 0"]),
    ],
)
def test_names_that_are_refused(tmp_path, named, words):
    """With the file and the line."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "".join(
            json.dumps(line) + "\n"
            for line in ({"prompt": "one"}, {"prompt": "two", "rewards": named})
        )
    )
    prompts = load_prompts(file)
    with pytest.raises(UserError) as error:
        check_prompts(SPECS, [p.text for p in prompts], [p.metadata for p in prompts])
    assert all(word in str(error.value) for word in [f"{file}:2", '"rewards"', *words]), error.value


def test_a_reward_looks_at_its_own_prompts_only():
    specs = parse_rewards({"ocr": 1.0, "jpeg": 0.1})
    check_prompts(
        specs,
        ['a sign that says "OPEN"', "a cat"],
        [{"rewards": ["ocr", "jpeg"]}, {"rewards": ["jpeg"]}],
    )
    check_asked(specs, [{"rewards": ["ocr"]}, {}])
    with pytest.raises(UserError, match="a cat"):
        check_prompts(specs, ['a sign that says "OPEN"', "a cat"], [{}, {"rewards": ["ocr"]}])
    with pytest.raises(UserError, match="rewards.jpeg: it applies to no prompt of data.train"):
        check_asked(specs, [{"rewards": ["ocr"]}])


@pytest.mark.parametrize("name", ["failed", "scored", "reward", "gain"])
def test_names_of_metrics_are_refused(name):
    with pytest.raises(UserError, match=f"rewards.{name}: a metric has this name"):
        parse_rewards({name: {"type": "jpeg"}})


def test_a_sum_that_overflows_is_a_failure():
    from tempflow.rewards import Scores

    values = {"a": [1, 3e38, 3e38, 1], "b": [1, 3e38, -3e38, np.nan]}
    scores = {name: Scores(np.array(row, np.float32)) for name, row in values.items()}
    found = combine(scores, [RewardSpec("a", 1.0), RewardSpec("b", 1.0)]).values
    assert found.tolist()[0] == 2 and np.isnan(found).tolist() == [False, True, False, True]
    huge = combine(scores, [RewardSpec("a", 1e300), RewardSpec("b", -1e300)]).values
    assert np.isnan(huge[[1, 2, 3]]).all() and np.isfinite(huge[0]), (
        "infinity minus infinity is no reward either"
    )


# --------------------------------------------------------------------------------------- advantages
def of_kinds(seed=0):
    """[P, S, K, B] of prompts for the first reward, the second, or both; scales and levels far
    apart; some failed."""
    rng = np.random.default_rng(seed)
    fitting = np.array([[True, False], [False, True], [True, True], [True, False], [False, True]])
    one, other = rng.normal(0.5, 0.2, (5, 2, 3, 4)), rng.normal(900, 50, (5, 2, 3, 4))
    one[0, 0, 0, 1], other[1, 1, 2, 0], other[2, 0, 1, 3] = np.nan, np.nan, np.nan
    parts = [
        np.where(fitting[:, i, None, None, None], part, np.nan)
        for i, part in enumerate((one, other))
    ]
    total = sum(
        np.where(fitting[:, i, None, None, None], w * part, 0)
        for i, (w, part) in enumerate(zip((1.0, 0.01), (one, other)))
    )
    return fitting, parts, total


@pytest.mark.parametrize("group", ["seed", "prompt"])
@pytest.mark.parametrize("global_std", [False, True])
def test_sums_are_compared_with_sums_of_the_same_rewards(group, global_std):
    """Each kind of prompt has the advantages that it would have in a batch of its own."""
    fitting, parts, total = of_kinds()
    how = Group(group, 5.0, global_std)
    found = dense(how, total, parts, [1.0, 0.01], list(fitting.T))
    for rows in ([0, 3], [1, 4], [2]):
        np.testing.assert_array_equal(found.values[rows], dense(how, total[rows]).values)
    assert (found.valid == np.isfinite(total)).all()
    assert global_std == (not np.array_equal(found.values, dense(how, total).values))


@pytest.mark.parametrize("group", ["seed", "prompt"])
@pytest.mark.parametrize("global_std", [False, True])
def test_each_reward_is_compared_within_itself(group, global_std):
    """A prompt for one reward has that reward's advantages, up to the one scale of the batch; it
    fails by no other."""
    fitting, parts, total = of_kinds()
    found = dense(Gdpo(group, 1e9, global_std), total, parts, [1.0, 2.0], list(fitting.T))
    assert (found.valid == np.isfinite(total)).all()
    alone = []
    for i, part in enumerate(parts):
        rows = np.flatnonzero(fitting[:, i])
        one = np.zeros_like(part)
        one[rows] = dense(
            Group(group, 1e9, global_std), np.where(found.valid, part, np.nan)[rows]
        ).values
        alone.append(one)
    expected = alone[0] + 2.0 * alone[1]
    expected /= expected[found.valid].std() + 1e-4
    np.testing.assert_allclose(found.values, expected, rtol=1e-5, atol=1e-6)
    assert not found.zero_spread.any() and found.values[fitting[:, 0] & ~fitting[:, 1]].any()


def test_curation_compares_prompts_of_the_same_rewards():
    """Small spreads are small beside those of the same rewards alone: only the prompt without any
    rests."""
    metadata = [{"rewards": ["jpeg"]}] * 3 + [{"rewards": ["ocr"]}] * 3
    kinds = kinds_of(fits(parse_rewards({"ocr": 1.0, "jpeg": 1.0}), metadata))
    rewards = (
        np.random.default_rng(0).normal(size=(6, 2, 2, 4))
        * np.array([1e3, 1e3, 0, 1, 1, 1])[:, None, None, None]
    )
    for given_kinds, resting in ((kinds, {2}), (None, {2, 3, 4, 5})):
        chooser = Curation(Settings(spread=0.1, rest=5), PromptOrder(6, 6, 0), "seed", given_kinds)
        draw = chooser.draw(0)
        chooser.update(draw, 0, dense_slots(rewards.shape), rewards[draw.indices].ravel())
        assert set(np.flatnonzero(chooser.until)) == resting
