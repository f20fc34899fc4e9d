"""The message of every refusal of a config."""

import pytest
from engine_cases import changed, config_table, write_config

from tempflow.config import load_config, parse_config
from tempflow.errors import UserError

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
