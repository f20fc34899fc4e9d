"""A thousand configs with mistakes in them: each is refused by messages that name keys, or the dry
run can say what it takes."""

import copy
import json

import pytest
from engine_cases import config_table
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tempflow.config import Config, load_config
from tempflow.errors import UserError
from tempflow.estimate import estimate

TABLE = config_table(
    model={
        "dtype": "float32",
        "lora": {"rank": 4, "alpha": 8.0, "targets": None},
        "gradient_checkpointing": True,
    },
    rollout={
        "suffix": {"stride": 2, "order": 1, "exact_steps": 1, "audit_every": 5},
        "sde": {"type": "flow", "eta": 0.7},
        "micro_batch": 48,
        "decode_batch": 16,
        "replica": True,
    },
    training={
        "penalty": {"coef": 0.01},
        "ema": {"decay": 0.9, "every": 8},
        "minutes": 3.0,
        "updates": {"passes": 2},
        "seed": 0,
        "advantage": {"over": "seed"},
        "objective": {"ratio": "plain"},
    },
    deepspeed={
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1000,
            "overlap_comm": True,
            "offload_optimizer": {"device": "none"},
        },
    },
)
NUMBERS = [
    -(10**400),
    -1,
    0,
    1,
    2,
    3,
    7,
    16,
    64,
    1000,
    65536,
    2**31,
    10**18,
    10**400,
    -0.0,
    1e-300,
    0.5,
    1.0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
]
TEXTS = [
    "",
    "auto",
    "bfloat16",
    "all",
    "prompt",
    "flow_grpo",
    "mix_grpo",
    "cps",
    "cpu",
    "SGD",
    "a\nb",
    "\x00",
    "\ud800",
    "ä" * 300,
    "owner/name",
    ".",
]
leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(TEXTS)
    | st.text(max_size=4)
)
garbage = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["stage", "rank", "random", "x"]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def paths(table: dict, before: tuple = ()) -> list[tuple]:
    """Every key of nested tables, as a path."""
    found = []
    for key, value in table.items():
        found.append((*before, key))
        if isinstance(value, dict):
            found += paths(value, (*before, key))
    return found


@st.composite
def mutated(draw) -> dict:
    """The table with one to three mistakes."""
    table = copy.deepcopy(TABLE)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(table) or [("model",)]))
        inner = table
        for key in path[:-1]:
            inner = inner[key]
        how = draw(st.sampled_from(["delete", "unknown", "value", "number", "null"]))
        if how == "delete":
            inner.pop(path[-1], None)
        elif how == "unknown":
            inner[
                draw(
                    st.text(max_size=6)
                    | st.sampled_from(["itterations", "$schema", "stage", "rank"])
                )
            ] = draw(garbage)
        else:
            inner[path[-1]] = draw(
                {"value": garbage, "number": st.sampled_from(NUMBERS), "null": st.none()}[how]
            )
    return table


def names_a_key(line: str, table: dict, file) -> bool:
    """Each line opens with a key: one of the config, or the unknown one that was given. Of text
    that no JSON should hold, the file comes first."""
    given = [key if key.isprintable() else repr(key) for key in table] + [repr("")]
    unfit = line.removeprefix(f"config file {file}: ")
    if unfit != line:
        return unfit.startswith(
            (
                "a key holds",
                *(
                    f"{key}{end}"
                    for key in [*Config.model_fields, "$schema", *given]
                    for end in (".", "[", " holds")
                ),
            )
        )
    return any(line.startswith((f"{key}.", f"{key}:")) for key in [*Config.model_fields, *given])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mutated")


def with_value(*path, value) -> dict:
    table = copy.deepcopy(TABLE)
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return table


@example(with_value("deepspeed", "zero_optimization", "reduce_bucket_size", value=-(10**400)))
@example(with_value("data", "prompts_per_iteration", value=10**400))
@example(with_value("model", "path", value="\x00"))
@example(with_value("training", "seed", value=-1))
@example(with_value("", value="\ud800"))
@example(with_value("rollout", "\ud800", value=1))
@example(with_value("data", "train", value="\udfff"))
@example(with_value("$schema", value=["\ud800"]))
@settings(
    max_examples=1000,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(table=mutated())
def test_any_mistake_is_refused_or_estimated(folder, table):
    file = folder / "config.json"
    file.write_text(json.dumps(table))
    try:
        result = estimate(load_config(file), gpus=2, prompts=4000, card_gb=0.05)
    except UserError as error:
        table.pop("$schema", None)
        assert str(error) and all(
            names_a_key(line, table, file) for line in str(error).split("\n")
        ), str(error)
    else:
        assert result.total > 0 and result.phase("rollout").forwards > 0 and result.seconds >= 0


def test_the_unmutated_table_is_estimated(folder):
    file = folder / "whole.json"
    file.write_text(json.dumps(TABLE))
    assert estimate(load_config(file), gpus=2).fits
