"""The config: what is accepted, how it is overridden, and the message of every refusal."""

import importlib.util
import json
import typing
from pathlib import Path

import pytest
from engine_cases import ROOT, config_table, write_config
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


# ----------------------------------------------------------------------------------------- refusals
REFUSED = [
    # unknown keys
    (
        "training.iteratons",
        5,
        ["training.iteratons", "unknown key", "did you mean 'iterations'", "penalty"],
    ),
    ("trainig", {"seed": 1}, ["trainig", "did you mean 'training'", "rollout"]),
    ("training.updates.parst", 3, ["training.updates.parst", "did you mean 'parts'"]),
    ("model.lora", {"rnk": 4}, ["model.lora.rnk", "did you mean 'rank'", "alpha"]),
    ("rollout.plan.branch_steps", {"randm": 4}, ["rollout.plan.branch_steps", "random"]),
    ("data.zzz", 1, ["data.zzz", "unknown key", "train, heldout, prompts_per_iteration"]),
    # wrong types
    ("training.iterations", "five", ["training.iterations", "integer", "'five'"]),
    ("training.iterations", 5.5, ["training.iterations", "integer", "5.5"]),
    ("training.iterations", True, ["training.iterations", "integer", "True"]),
    ("training.advantage.global_std", 1, ["training.advantage.global_std", "true or false", "1"]),
    ("training.objective.clip_low", "1e-4", ["training.objective.clip_low", "number", "'1e-4'"]),
    ("data.train", 3, ["data.train", "expected a file, a folder or a table", "got 3"]),
    (
        "data.train",
        {"dataset": "a/b", "colum": "c"},
        ["data.train.colum", "did you mean 'column'", "split"],
    ),
    ("data.heldout", {"split": "test"}, ["data.heldout.dataset: required"]),
    ("data.curation", {"spread": 1.5}, ["data.curation.spread", "less than 1", "1.5"]),
    ("model.lora", 32, ["model.lora", "32"]),
    ("rollout", [], ["rollout", "[]"]),
    ("rewards", "ocr", ["rewards", "dictionary", "'ocr'"]),
    ("rollout.sde.eta", float("nan"), ["rollout.sde.eta", "number", "nan"]),
    # values outside what is allowed
    (
        "rollout.plan",
        "tempflo",
        [
            "rollout.plan",
            "did you mean 'tempflow'",
            "flow_grpo, mix_grpo",
            "my_module:MyPlan",
            "'tempflo'",
        ],
    ),
    ("rollout.sde", "ode", ["rollout.sde", "cps, dance, flow, precise", "'ode'"]),
    (
        "training.advantage.over",
        "batch",
        ["training.advantage.over", "'seed' or 'prompt'", "'batch'"],
    ),
    ("rollout.plan.seeds", 0, ["rollout.plan.seeds", "at least 1", "0"]),
    ("rollout.plan.children", 0, ["rollout.plan.children", "at least 1", "0"]),
    ("rollout.plan.children", 65, ["rollout.plan.children", "at most 64", "65"]),
    ("rollout.plan.children", [2, 65, 2], ["rollout.plan.children", "at most 64", "65"]),
    (
        "rollout.plan.children",
        [2, 2.5, 2],
        ["rollout.plan.children", "list of whole numbers", "2.5"],
    ),
    ("rollout.plan.children", [], ["rollout.plan.children", "list of whole numbers", "[]"]),
    (
        "rollout.plan.children",
        [2, 1, 3],
        ["rollout.plan.children", "group of one", '"seed"', "at least 2", "[2, 1, 3]"],
    ),
    ("rollout.plan.children", [2, 3], ["rollout.plan.children", "2 numbers for 3 branch steps"]),
    ("rollout.num_steps", 1, ["rollout.num_steps", "greater than or equal to 2", "1"]),
    ("rollout.height", -32, ["rollout.height", "greater than or equal to 1", "-32"]),
    ("rollout.sde.eta", 0, ["rollout.sde.eta", "above 0", "0"]),
    ("training.objective.clip_low", 1.5, ["training.objective.clip_low", "below 1", "1.5"]),
    ("training.penalty", {"coef": -0.1}, ["training.penalty.coef", "above 0", "-0.1"]),
    ("training.updates.parts", 0, ["training.updates.parts", "greater than or equal to 1", "0"]),
    ("training.lr_decay", 2, ["training.lr_decay", "less than or equal to 1", "2"]),
    ("rollout.suffix", {"stride": 0}, ["rollout.suffix.stride", "greater than or equal to 1", "0"]),
    (
        "rollout.suffix",
        {"stride": 1},
        ["rollout.suffix", "stride 1 changes nothing", "2 or more", '"float8"', "null"],
    ),
    (
        "rollout.suffix",
        {"weights": "int4"},
        ["rollout.suffix.weights", "'same' or 'float8'", "'int4'"],
    ),
    (
        "rollout.suffix",
        {"every": 2},
        ["rollout.suffix.every", "stride, order, exact_steps, weights, audit_every"],
    ),
    ("rollout.suffix", "fast", ["rollout.suffix", "'fast'"]),
    ("rollout.compile", "max", ["rollout.compile", "'eager', 'compile' or 'compile-max'", "'max'"]),
    # a group of one
    ("rollout.plan.children", 1, ["rollout.plan.children", "group of one", "at least 2"]),
    # the grid
    (
        "rollout.plan.branch_steps",
        [0, 9],
        ["rollout.plan.branch_steps", "step 9", "0 to 8", "num_steps 10"],
    ),
    ("rollout.plan.branch_steps", [0, 20], ["rollout.plan.branch_steps", "step 20", "0 to 8"]),
    (
        "rollout.plan.branch_steps",
        [-1, 2],
        ["rollout.plan.branch_steps", "steps from 0 on", "[-1, 2]"],
    ),
    ("rollout.plan.branch_steps", [3, 1], ["rollout.plan.branch_steps", "rising", "[3, 1]"]),
    (
        "rollout.plan.branch_steps",
        [1, 1],
        ["rollout.plan.branch_steps", "without repeats", "[1, 1]"],
    ),
    ("rollout.plan.branch_steps", [], ["rollout.plan.branch_steps", "[]"]),
    (
        "rollout.plan.branch_steps",
        "some",
        ["rollout.plan.branch_steps", '"all"', '{"random": n}', "'some'"],
    ),
    ("rollout.plan.branch_steps", {"random": 10}, ["rollout.plan.branch_steps.random", "10;", "9"]),
    (
        "rollout.plan.branch_steps",
        {"random": 0},
        ["rollout.plan.branch_steps", "n from 1 on", "{'random': 0}"],
    ),
    # deepspeed keys that are the engine's
    ("deepspeed.train_batch_size", 8, ["deepspeed.train_batch_size", "training.micro_batch"]),
    ("deepspeed.gradient_accumulation_steps", 2, ["deepspeed.gradient_accumulation_steps"]),
    (
        "deepspeed.zero_optimization",
        {"stage": 4},
        ["deepspeed.zero_optimization", "0, 1, 2 or 3", "4"],
    ),
    ("deepspeed.zero_optimization", 2, ["deepspeed.zero_optimization", "table", "2"]),
    ("deepspeed.bf16", True, ["deepspeed.bf16", "table", "True"]),
    ("deepspeed.optimizer", "AdamW", ["deepspeed.optimizer", "table", "'AdamW'"]),
    ("deepspeed", {}, ["deepspeed.optimizer", "missing"]),
]


def changed(key, value):
    table = config_table()
    *sections, name = key.split(".")
    inner = table
    for section in sections:
        inner[section] = inner.get(section) or {}
        inner = inner[section]
    inner[name] = value
    return table


@pytest.mark.parametrize(
    "key, value, words", REFUSED, ids=[f"{key}={value!r}" for key, value, _ in REFUSED]
)
def test_refused(key, value, words):
    with pytest.raises(UserError) as error:
        parse_config(changed(key, value))
    assert all(word in str(error.value) for word in words), error.value
    assert str(error.value).startswith(key.split(".")[0]), "the message opens with the key"


@pytest.mark.parametrize(
    "section, words",
    [
        (
            {"rollout": {"plan": {"type": "flow_grpo", "branch_steps": [0, 4, 8]}}},
            ["training.advantage.over", '"seed"', "flow_grpo", '"prompt"'],
        ),
        (
            {
                "rollout": {"plan": {"type": "mix_grpo", "window": 10}},
                "training": {"advantage": {"over": "prompt"}},
            },
            ["rollout.plan.window", "10;", "at most 9"],
        ),
        (
            {
                "rollout": {"plan": {"type": "flow_grpo", "seeds": 1, "branch_steps": [0, 4, 8]}},
                "training": {"advantage": {"over": "prompt"}},
            },
            ["rollout.plan.seeds", "at least 2"],
        ),
        (
            {
                "rollout": {"plan": {"children": 1, "seeds": 1}},
                "training": {"advantage": {"over": "prompt"}},
            },
            ["rollout.plan.children", "at least 2"],
        ),
        (
            {"rollout": {"plan": {"children": [2, 3], "branch_steps": {"random": 2}}}},
            ["rollout.plan.children", '"all" or a list of as many steps', '{"random": n}'],
        ),
        (
            {"training": {"advantage": "dense"}},
            ["training.advantage", "dense", "plan tempflow", "rollout.plan.values true"],
        ),
        (
            {"rollout": {"plan": {"type": "mix_grpo"}}, "training": {"advantage": "turning_point"}},
            ["training.advantage", "turning_point", "mix_grpo", "rollout.plan.values true"],
        ),
        (
            {
                "rollout": {"plan": {"type": "flow_grpo", "values": True}},
                "training": {"advantage": {"over": "prompt"}},
            },
            [
                "rollout.plan.values",
                "training.advantage group does not use",
                "dense, stepwise, turning_point",
            ],
        ),
        (
            {
                "rollout": {"plan": {"type": "flow_grpo", "values": True}},
                "training": {"advantage": "dense", "objective": "nft"},
            },
            ["rollout.plan.values", "training.objective nft learns from finished latents"],
        ),
        (
            {
                "rollout": {"plan": {"type": "flow_grpo", "values": True}},
                "training": {"advantage": {"type": "dense", "over": "seed"}},
            },
            ["training.advantage.over", '"seed"', '"prompt"'],
        ),
        ({"rollout": {"graphs": True, "replica": False}}, ["rollout.graphs", "rollout.replica"]),
        (
            {"rollout": {"suffix": {"weights": "float8"}, "replica": False}},
            ['rollout.suffix.weights: "float8"', "rollout.replica"],
        ),
        (
            {"rollout": {"compile": "compile", "replica": False}},
            ["rollout.compile", "training.compile"],
        ),
        (
            {
                "training": {"compile": "compile"},
                "deepspeed": {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}},
            },
            ["training.compile", "ZeRO stage 3", '"eager"'],
        ),
        (
            {"rollout": {"sde": {"type": "cps", "eta": 1.5}}},
            ["rollout.sde.eta", "1.5", "above 0 and at most 1"],
        ),
    ],
)
def test_refused_together(section, words):
    with pytest.raises(UserError) as error:
        parse_config(config_table(**section))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("key", ["model.path", "data.train", "model", "data", "rewards"])
def test_required_keys(key):
    table = json.loads(json.dumps(MINIMAL))
    *sections, name = key.split(".")
    del (table[sections[0]] if sections else table)[name]
    with pytest.raises(UserError, match=f"^{key}: required"):
        parse_config(table)


def test_every_mistake_is_named_at_once():
    table = config_table(training={"seed": "x"}, rollout={"heigth": 3, "width": 0})
    with pytest.raises(UserError) as error:
        parse_config(table)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and all(
        any(key in line for line in lines)
        for key in ("training.seed", "rollout.heigth", "rollout.width")
    )


def test_one_mistake_in_branch_steps_is_one_line():
    """Three kinds of value are allowed there; only one of them can have been meant."""
    for value in ([0, "x"], {"random": "x"}, {"randm": 2}, "some", 3.5):
        with pytest.raises(UserError) as error:
            parse_config(changed("rollout.plan.branch_steps", value))
        assert len(str(error.value).splitlines()) == 1, error.value


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["does not exist"]),
        ("{", ["not JSON"]),
        ("[]", ["table of sections", "list"]),
        ("\xff", ["not JSON"]),
    ],
)
def test_files_that_are_no_config(tmp_path, content, words):
    file = tmp_path / "broken.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        load_config(file)
    assert all(word in str(error.value) for word in ["config file", str(file), *words]), error.value


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "setting, words",
    [
        ("training.iterations", ["--set training.iterations", "section.key=value"]),
        ("=3", ["--set =3", "section.key=value"]),
        ("training.iterations.more=3", ["--set", "iterations is not a table"]),
        ("training.itterations=3", ["training.itterations", "did you mean 'iterations'"]),
    ],
)
def test_overrides_that_are_refused(tmp_path, setting, words):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path), [setting])
    assert all(word in str(error.value) for word in words), error.value


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
