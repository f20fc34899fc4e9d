"""The config: what is required and accepted, how it is overridden, and that any JSON is accepted or
refused with a message; the messages: test_config_refusals.py."""

import importlib.util
import json
import typing
from pathlib import Path

import pytest
from engine_cases import ROOT, changed, config_table, write_config
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tempflow.config import Config, load_config, parse_config
from tempflow.errors import UserError

MINIMAL = {
    "model": {"path": "somewhere"},
    "data": {"train": "prompts.txt"},
    "rewards": {"ocr": 1.0},
    "deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
}


def test_generated_files_are_fresh():
    """docs/config.md and configs/schema.json say what the config and its components say now: python
    docs/make_config_table.py"""
    spec = importlib.util.spec_from_file_location(
        "make_config_table", ROOT / "docs/make_config_table.py"
    )
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    generated = table.files()
    assert {file.name for file in generated} == {"config.md", "schema.json"}
    stale = [
        file.name for file, text in generated.items() if file.read_text(encoding="utf-8") != text
    ]
    assert not stale, "python docs/make_config_table.py"


def test_the_schema_key_alone_is_passed_over(tmp_path):
    file = tmp_path / "one.json"
    table = {**config_table(), "$schema": "./schema.json"}
    file.write_text(json.dumps(table))
    assert load_config(file) == load_config(write_config(tmp_path, "one.json"))
    for more in ({"$id": "x"}, {"model": {**table["model"], "$schema": "x"}}):
        file.write_text(json.dumps({**table, **more}))
        with pytest.raises(UserError, match=r"\$(id|schema): unknown key"):
            load_config(file)


def test_only_what_names_the_task_is_required():
    assert {
        key
        for section in ("model", "data")
        for key, field in Config.model_fields[section].annotation.model_fields.items()
        if field.is_required()
    } == {"path", "train"}
    config = parse_config(MINIMAL)
    assert config.rollout.plan == {
        "type": "tempflow",
        "seeds": 4,
        "children": 6,
        "branch_steps": "all",
    }
    assert config.plan().steps(0) == list(range(9)) and config.rollout.num_steps == 10
    assert config.training.penalty is None and config.penalty() is None


@pytest.mark.parametrize("key", ["model.path", "data.train", "model", "data", "rewards"])
def test_required_keys(key):
    table = json.loads(json.dumps(MINIMAL))
    *sections, name = key.split(".")
    del (table[sections[0]] if sections else table)[name]
    with pytest.raises(UserError, match=f"^{key}: required"):
        parse_config(table)


CONTRACT = {
    "model": "path dtype lora attention_backend gradient_checkpointing",
    "data": "train heldout prompts_per_iteration",
    "rollout": (
        "plan height width num_steps sde guidance_scale micro_batch replica graphs compile suffix"
    ),
    "training": "iterations updates micro_batch advantage objective penalty weighting ema seed",
    "eval": "every num_steps prompts",
    "checkpoint": "every keep",
    "logging": "dir name tensorboard wandb",
}


@pytest.mark.parametrize("section", CONTRACT)
def test_contract_keys_exist(section):
    assert set(CONTRACT[section].split()) <= set(
        Config.model_fields[section].annotation.model_fields
    )


def test_every_key_has_its_help():
    def walk(model, path=()):
        for name, field in model.model_fields.items():
            options = [field.annotation, *typing.get_args(field.annotation)]
            inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
            for model_inside in inner:
                yield from walk(model_inside, (*path, name))
            if not inner:
                yield ".".join((*path, name)), field.description

    missing = [name for name, text in walk(Config) if not text and name != "rewards"]
    assert not missing


def test_resolved_config_reads_back():
    config = parse_config(
        config_table(
            rollout={"plan": {"branch_steps": {"random": 3}}}, training={"ema": {"decay": 0.5}}
        )
    )
    assert config.rollout.plan["branch_steps"] == {"random": 3}
    assert parse_config(json.loads(config.model_dump_json())) == config


# ---------------------------------------------------------------------------------------- overrides
def test_overrides(tmp_path):
    file = write_config(tmp_path)
    settings = [
        "training.iterations=7",
        'training.ema={"decay": 0.5}',
        "model.lora=null",
        "rollout.plan.branch_steps=[1,2]",
        "training.objective.ratio=guard",
        "logging.name=x=y",
        "deepspeed.zero_optimization.stage=2",
        "rewards.ocr.weight=0.5",
        "rewards.ocr.detect=false",
    ]
    config = load_config(file, settings)
    assert (
        config.training.iterations == 7
        and config.training.ema.decay == 0.5
        and config.training.ema.every == 8
    )
    assert (
        config.rollout.plan["branch_steps"] == [1, 2]
        and config.training.objective["ratio"] == "guard"
        and config.logging.name == "x=y"
    )
    assert config.deepspeed["zero_optimization"]["stage"] == 2 and "optimizer" in config.deepspeed
    assert config.rewards["ocr"] == {"weight": 0.5, "detect": False}
    assert load_config(file, ["training.seed=1", "training.seed=2"]).training.seed == 2
    assert load_config(file).logging.name == "small"


def test_relative_paths_are_looked_up_from_the_config(tmp_path, monkeypatch):
    """From the working directory first, then from the folders above the config file."""
    folder, elsewhere = tmp_path / "project/configs", tmp_path / "elsewhere"
    for place in (folder, elsewhere, tmp_path / "project/prompts"):
        place.mkdir(parents=True)
    (tmp_path / "project/prompts/words.txt").write_text("a\n")
    file = write_config(folder, data={"train": "prompts/words.txt", "heldout": None})
    monkeypatch.chdir(elsewhere)
    assert Path(load_config(file).data.train) == tmp_path / "project/prompts/words.txt"
    (elsewhere / "prompts").mkdir()
    (elsewhere / "prompts/words.txt").write_text("b\n")
    assert load_config(file).data.train == "prompts/words.txt"


# ---------------------------------------------------------------------------------------- any JSON
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = [
    *CONTRACT,
    *(f"{s}.{k}" for s, keys in CONTRACT.items() for k in keys.split()),
    "rewards",
    "deepspeed",
    "rollout.plan.seeds",
    "model.lora.rank",
    "deepspeed.bf16",
    "deepspeed.zero_optimization.stage",
    "rollout.plan.branch_steps",
    "training.penalty.coef",
    "anything",
]


@given(st.sampled_from(KEYS), json_values)
def test_any_json_is_accepted_or_refused_with_a_message(key, value):
    """Never another exception, whatever the file holds."""
    try:
        parse_config(changed(key, value))
    except UserError as error:
        assert str(error)
