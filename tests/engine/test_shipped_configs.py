"""The shipped configs: each parses, and docs/configs.md gives a reason for every value of theirs."""

import importlib.util

import pytest
from engine_cases import ROOT

from tempflow.config import load_config

NAMES = sorted(file.stem for file in (ROOT / "configs").glob("*.json") if file.stem != "schema")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_configs_page", ROOT / "docs/make_configs_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_configs_say_now(script):
    assert script.TARGET.read_text(encoding="utf-8") == script.page(), "python docs/make_configs_page.py"
    assert sorted(script.SHIPPED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_a_reason(script, name):
    load_config(ROOT / f"configs/{name}.json")
    assert not set(script.shipped(name)) - set(script.WHY)


def test_no_reason_without_a_value(script):
    assert not set(script.WHY) - {key for name in NAMES for key in script.shipped(name)}


def test_lora_configs_have_the_papers_values(script):
    for name in ("flux_lora", "sd35_lora", "sd35_zero2_lora"):
        values, paper = script.shipped(name), script.SHIPPED[name][1]
        assert {key: values.get(key) for key in paper} == paper
