"""The shipped configs: each parses, and docs/configs.md gives a reason for every value of
theirs."""

import importlib.util
import json

import pytest
from engine_cases import ROOT

from tempflow.config import load_config
from tempflow.data.prompts import load_prompts
from tempflow.rewards import parse_rewards

NAMES = sorted(file.stem for file in (ROOT / "configs").glob("*.json") if file.stem != "schema")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "make_configs_page", ROOT / "docs/make_configs_page.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_configs_say_now(script):
    assert script.TARGET.read_text(encoding="utf-8") == script.page(), (
        "python docs/make_configs_page.py"
    )
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


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs(name, tmp_path, monkeypatch):
    """Each parses from any folder, and names prompts and rewards that are there."""
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / f"configs/{name}.json")
    assert config.logging.name == name
    assert load_prompts(config.data.train) and load_prompts(config.data.heldout)
    assert parse_rewards(config.rewards)
    assert len(load_prompts(config.data.train)) >= config.data.prompts_per_iteration


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_name_their_schema(name):
    """And the schema knows each of their keys, has what they leave out as optional, and pins
    choices."""
    file = ROOT / f"configs/{name}.json"
    table = json.loads(file.read_text())
    schema = json.loads((file.parent / table["$schema"]).read_text())
    assert (
        set(schema["required"]) <= set(table) <= set(schema["properties"])
        and not schema["additionalProperties"]
    )
    for section in (name for name in table if "$ref" in schema["properties"][name]):
        part = schema["$defs"][schema["properties"][section]["$ref"].rsplit("/", 1)[1]]
        assert set(part.get("required", ())) <= set(table[section]) <= set(part["properties"])
        for key, value in table[section].items():
            assert value in part["properties"][key].get("enum", [value])
