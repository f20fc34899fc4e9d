"""The table of metrics: what it says of a key, and the pages that are made from it or must agree
with it."""

import importlib.util
import re
from pathlib import Path

import pytest

from tempflow.run.metrics import GROUPS, changes, describe, drift_texts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "key, found",
    [
        ("eval/reward", "eval/reward"),
        ("eval/ocr", "eval/NAME"),
        ("eval/my_rewards:Sharp", "eval/NAME"),
        ("eval/ocr/stderr", "eval/NAME/stderr"),
        ("eval/recall", "eval/recall"),
        ("reward_std/step_12", "reward_std/step_K"),
        ("reward/ocr/std", "reward/NAME/std"),
        ("reward_std/step_", None),
        ("nonsense", None),
    ],
)
def test_a_key_is_described_exactly_or_by_its_pattern(key, found):
    metric = describe(key)
    assert (metric and metric.key) == found


def test_every_metric_is_described_once():
    keys = [metric.key for group in GROUPS.values() for metric in group]
    assert len(keys) == len(set(keys))
    assert all(
        metric.title and metric.help and not metric.help.endswith(".")
        for group in GROUPS.values()
        for metric in group
    )
    assert all(
        metric.change and metric.better
        for group in GROUPS.values()
        for metric in group
        if metric.limit is not None
    )


def test_limits_are_not_changes_themselves():
    at = {"drift/color_shift": 15.0, "drift/color_spread": 0.9, "eval/recall": 0.5}
    assert (
        changes(at)
        == changes({})
        == changes({"drift/color_shift": None, "eval/recall": float("nan")})
        == []
    )
    beyond = {"drift/color_shift": 15.1, "drift/color_spread": 0.89, "eval/recall": 0.49}
    assert len(changes(beyond)) == 3
    assert drift_texts({**at, "eval/reward": 0.5}) == [
        "color shift 15.0",
        "color spread 0.90",
        "recall 0.50",
    ]


def test_the_page_is_fresh():
    spec = importlib.util.spec_from_file_location(
        "make_metrics_page", ROOT / "docs/make_metrics_page.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.TARGET.read_text(encoding="utf-8") == script.page(), (
        "python docs/make_metrics_page.py"
    )


def test_what_the_training_page_names_is_in_the_table():
    text = (
        (ROOT / "docs/training.md")
        .read_text(encoding="utf-8")
        .split("| key | meaning |")[1]
        .split("\n\n")[0]
    )
    keys = [
        key
        for line in text.splitlines()
        for key in re.findall(r"`([a-zA-Z_]+(?:/\w+)*)`", line.split("|")[1] if "|" in line else "")
    ]
    assert len(keys) > 20 and not [key for key in keys if describe(key.replace("_K", "_0")) is None]
