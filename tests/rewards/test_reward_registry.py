"""The `rewards` section of a config: what is accepted, and what each refusal says."""

import subprocess
import sys

import numpy as np
import pytest
from reward_helpers import refused

from tempflow.errors import UserError
from tempflow.rewards import RewardSpec, build_reward, check_prompts, parse_rewards
from tempflow.rewards.base import Scores, as_scores
from tempflow.rewards.registry import load_rewards

IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


def test_both_forms():
    section = {"ocr": 1, "jpeg": {"weight": -0.5, "goal": "large"}, "my_module:Mine": {"depth": 3}}
    assert parse_rewards(section) == [
        RewardSpec("ocr", 1.0, {}),
        RewardSpec("jpeg", -0.5, {"goal": "large"}),
        RewardSpec("my_module:Mine", 1.0, {"depth": 3}),
    ]
    assert parse_rewards({"small": {"type": "jpeg", "goal": "small"}}) == [
        RewardSpec("small", 1.0, {"goal": "small"}, "jpeg")
    ]
    assert section["jpeg"] == {"weight": -0.5, "goal": "large"}, "the config must not be changed"


@pytest.mark.parametrize(
    "section, words",
    [
        ({}, ["at least one reward", '{"ocr": 1.0}']),
        (["ocr"], ["at least one reward", "['ocr']"]),
        ({"ocr": "1"}, ["rewards.ocr", "finite number", "'1'"]),
        ({"ocr": True}, ["rewards.ocr", "True"]),
        ({"ocr": None}, ["rewards.ocr", "None"]),
        ({"ocr": float("nan")}, ["rewards.ocr", "nan"]),
        ({"ocr": {"weight": float("inf")}}, ["rewards.ocr", "inf"]),
        ({"ocr": 0, "jpeg": 0.0}, ["every weight is 0"]),
        ({"orc": 1.0}, ["'orc'", "did you mean 'ocr'", "jpeg, ", "my_module:MyReward"]),
        ({"zebra": 1.0}, ["'zebra'", "Known: ", "jpeg, "]),
        ({"module:": 1.0}, ["'module:'"]),
        ({"mine": {"type": "orc"}}, ["'orc'", "did you mean 'ocr'"]),
        ({"mine": {"type": ["ocr"]}}, ["['ocr']"]),
        ({3: 1.0}, ["unknown reward 3"]),
    ],
)
def test_section_refused(section, words):
    with refused(words):
        parse_rewards(section)


@pytest.mark.parametrize(
    "name, options, words",
    [
        (
            "ocr",
            {"detct": False},
            ["rewards.ocr.detct", "did you mean 'detect'", "Allowed: weight, type, frames, detect"],
        ),
        ("ocr", {"detect": "no"}, ["rewards.ocr.detect", "true or false", "'no'"]),
        ("jpeg", {"quality": 9.5}, ["rewards.jpeg.quality", "whole number", "9.5"]),
        ("jpeg", {"quality": True}, ["rewards.jpeg.quality", "True"]),
        ("jpeg", {"quality": 500}, ["rewards.jpeg.quality", "1 to 95", "500"]),
        ("jpeg", {"goal": "tiny"}, ["rewards.jpeg.goal", '"small" or "large"', "'tiny'"]),
        (
            "no_such_module:X",
            {},
            ["no_such_module:X", "ModuleNotFoundError", "folder of the command"],
        ),
        ("faulty_rewards:Nothing", {}, ["faulty_rewards:Nothing", "AttributeError"]),
        ("faulty_rewards:NotAReward", {}, ["subclass of tempflow.rewards.Reward"]),
        ("faulty_rewards:NoScore", {}, ["rewards.faulty_rewards:NoScore", "does not define score"]),
        ("faulty_rewards:Faulty", {"fault": "nan"}, ["counter", "no default"]),
        (
            "faulty_rewards:first_pixel",
            {"images": 1},
            ["images", "Allowed: weight, type, frames, scale"],
        ),
        ("faulty_rewards:first_pixel", {"scale": "big"}, ["scale", "a number"]),
    ],
)
def test_reward_refused(name, options, words):
    with refused(words):
        build_reward(name, options)


def test_entry_of_any_name_is_named_by_its_key():
    with refused(["rewards.small.goal: expected"]):
        build_reward("small", {"goal": "tiny"}, "jpeg")
    with refused(["rewards.mine: could not start: ImportError: No module named 'left_pad'"]):
        load_rewards([RewardSpec("mine", 1.0, {}, "faulty_rewards:NeverStarts")], threads=1)


def test_function_as_reward():
    reward = build_reward("faulty_rewards:first_pixel", {"scale": 2})
    assert reward.score(IMAGES + np.uint8(3), ["", ""], [{}, {}]).tolist() == [6, 6]
    reward.check_prompts(["anything"], [{}])


def test_check_prompts_asks_every_reward():
    specs = parse_rewards({"jpeg": 1.0, "ocr": 1.0})
    check_prompts(specs, ['the word "HI"'], [{}])
    with pytest.raises(UserError, match="quotation marks"):
        check_prompts(specs, ["no words"], [{}])


def test_jpeg():
    flat, noise = (
        np.zeros((32, 32, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8),
    )
    small = build_reward("jpeg").score(np.stack([flat, noise]), ["", ""], [{}, {}])
    large = build_reward("jpeg", {"goal": "large"}).score(
        np.stack([flat, noise]), ["", ""], [{}, {}]
    )
    assert small.values[0] > small.values[1]
    assert np.array_equal(small.values, -large.values)
    assert 1.0 < large.values[1] < 5.0 and large.details[1].endswith(" kB")


@pytest.mark.parametrize(
    "result",
    [[1, 2], [[1], [2], [3]], ["1", "2", "3"], None, {"a": 1}, 3.0, [1, None, 2], [[1], 2, 3]],
)
def test_garbage_scores(result):
    with pytest.raises(ValueError, match="the reward returned"):
        as_scores(result, 3)


@pytest.mark.parametrize(
    "result", [[1, 2, np.inf], [1, -np.inf, 3], [1e300, 2, 3], np.array([1, 2, 1e39])]
)
@pytest.mark.parametrize("details", [None, ["a", "b", "c"]])
def test_what_overflows_is_a_failure_of_that_image(result, details):
    bad = ~(np.abs(np.array(result)) < 3e38)
    found = as_scores(Scores(result, details), 3)
    assert np.isnan(found.values).tolist() == bad.tolist()
    assert [text.startswith("not scored") for text in found.details] == bad.tolist()
    assert details is None or all(
        text == old for text, old, lost in zip(found.details, details, bad) if not lost
    )


def test_as_scores_accepts():
    for result in (
        [1, 0, np.nan],
        np.array([1, 0, np.nan]),
        Scores(np.array([1, 0, np.nan]), ["a", "b", "c"]),
    ):
        values = as_scores(result, 3).values
        assert values.dtype == np.float32 and np.array_equal(values, [1, 0, np.nan], equal_nan=True)
    assert as_scores([True, False], 2).values.tolist() == [1, 0]
    with pytest.raises(ValueError, match="1 details for 2"):
        as_scores(Scores(np.zeros(2), ["a"]), 2)


def test_what_is_masked_is_a_failure_of_that_image():
    """What lies under a mask is some number, which is none of the reward's."""
    for masked in (
        np.ma.masked_invalid([1.0, np.inf, 3.0]),
        np.ma.array([1, 999, 3], mask=[False, True, False]),
    ):
        assert np.array_equal(as_scores(masked, 3).values, [1, np.nan, 3], equal_nan=True)
    assert as_scores(np.ma.array([1.0, 2.0]), 2).values.tolist() == [1, 2]


def test_import_is_light():
    """Workers import this package; torch there would cost seconds and memory each."""
    code = (
        "import sys, tempflow.rewards; print({'torch', 'cv2', 'onnxruntime', 'rapidocr'} &"
        " set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "set()"
    )
