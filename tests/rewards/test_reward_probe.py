"""One test batch finds what a reward returns that is no number for each image, before anything is
sampled."""

import pytest

from tempflow.errors import UserError
from tempflow.rewards import RewardPool, RewardSpec, probe
from tempflow.types import Size

REFUSED = {
    "column": "shape [2, 1]",
    "row": "shape [1, 2]",
    "number": "shape []",
    "text": "not 2 numbers",
    "nothing": "None",
    "short": "shape [1]",
    "table": "not 2 numbers",
    "raises": "RuntimeError: no face in the image",
}
ACCEPTED = ["nan", "infinite", "fine"]


def spec(kind):
    return RewardSpec(f"of_{kind}", 1.0, {"kind": kind}, "faulty_rewards:answer")


@pytest.fixture(scope="module")
def pool():
    with RewardPool(
        [spec(kind) for kind in (*REFUSED, *ACCEPTED)], workers=1, retries=1, backoff_s=0.01
    ) as pool:
        yield pool


def run(pool, *kinds):
    probe(pool, [spec(kind) for kind in kinds], ["a prompt"], [{}], Size(32, 48))


@pytest.mark.parametrize("kind, words", REFUSED.items(), ids=REFUSED)
def test_refused(pool, kind, words):
    """Also behind one that is fine; of what a reward raises, where."""
    with pytest.raises(UserError) as error:
        run(pool, "fine", kind)
    text = str(error.value)
    assert (
        text.startswith(f"rewards.of_{kind}: ")
        and words in text
        and "\n" not in text
        and "BadScores" not in text
        and len(text) < 500
    )
    assert ("faulty_rewards.py" in text) == (kind == "raises")


@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted(pool, kind):
    """A plain gray image may have no score."""
    run(pool, kind)


def test_in_this_process_a_wrong_shape_is_refused_and_an_exception_let_through():
    with RewardPool([spec("column"), spec("raises")], workers=0) as pool:
        with pytest.raises(UserError, match=r"rewards.of_column: .*shape \[2, 1\]"):
            run(pool, "column")
        with pytest.raises(RuntimeError, match="no face"):
            run(pool, "raises")


def test_prompts_are_those_that_the_reward_is_for():
    specs = [
        RewardSpec(word, 1.0, {"word": word, "value": 1.0}, "faulty_rewards:only")
        for word in ("a", "b", "c")
    ]
    with RewardPool(specs, workers=0) as pool:
        # "c" has none, and is not asked
        probe(pool, specs, ["of b", "of a"], [{"rewards": ["b"]}, {"rewards": ["a"]}], Size(8, 8))
