"""Nothing is silently taken for "not given": empty texts and lists, keys given twice, numbers that
cannot be meant."""

import copy
import json
import re
import typing

import pytest
from engine_cases import config_table, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tempflow.arguments import filled, seed, steps, whole
from tempflow.commands import reward_server
from tempflow.config import Config, load_config, parse_config, strict_json
from tempflow.errors import UserError
from tempflow.profiling import Profile
from tempflow.registry import IN_CONFIG, KINDS, find, options_of
from tempflow.rewards import build_reward, parse_rewards

TABLES = {  # what optional tables need beside the key that is tried
    "model.lora": {},
    "data.train": {"dataset": "a"},
    "data.heldout": {"dataset": "a"},
    "data.curation": {},
    "rollout.suffix": {},
    "training.ema": {},
    "training.merge": {},
    "eval.stop": {"metric": "kl", "patience": 1},
}


def keys_of(model=Config, before=""):
    """(name, types allowed) of every key of the config that is no table."""
    for name, field in model.model_fields.items():
        given = typing.get_args(field.annotation)
        options = [
            field.annotation,
            *given,
            *(inner for option in given for inner in typing.get_args(option)),
        ]
        inside = [
            option
            for option in options
            if isinstance(option, type) and issubclass(option, BaseModel)
        ]
        for table in inside:
            yield from keys_of(table, f"{before}{name}.")
        yield f"{before}{name}", [option for option in options if option in (str, int, list[str])]


TYPES = {}  # of components, by option: a table whose type has it


def component_keys():
    """The same of the options of components, each with the type that has it."""
    for key, kind in IN_CONFIG.items():
        for name in KINDS[kind].ids:
            for option in options_of(find(kind, name)):
                words = typing.get_origin(option.annotation) is typing.Literal
                yield (
                    f"{key}.{option.name}",
                    [str] if words else [option.annotation] * (option.annotation is int),
                )
                TYPES[f"{key}.{option.name}"] = {"type": name} | (
                    {"coef": 0.1} if name == "kl" else {}
                )


KEYS = dict(pair for pair in (*keys_of(), *component_keys()) if pair[1])


def with_value(key: str, value) -> dict:
    table = config_table()
    *sections, name = key.split(".")
    inner, path = table, []
    for section in sections:
        path.append(section)
        default = TYPES.get(key) if ".".join(path) in IN_CONFIG else TABLES.get(".".join(path))
        if default is not None:
            inner[section] = copy.deepcopy(default)
        inner = inner.setdefault(section, {})
    inner[name] = value
    return table


def refused(key, value):
    with pytest.raises(UserError) as error:
        parse_config(with_value(key, value))
    text = str(error.value)
    assert text.startswith(key.removesuffix(".random")) and len(text) < 400, text


@pytest.mark.parametrize("key", [key for key, kinds in KEYS.items() if str in kinds])
def test_no_key_takes_an_empty_text(key):
    refused(key, "")


@pytest.mark.parametrize("key", [key for key, kinds in KEYS.items() if int in kinds])
def test_no_key_takes_numbers_that_cannot_be_meant(key):
    for value in (-1, 2**63, 10**40):
        refused(key, value)


def test_the_walk_finds_the_keys():
    """So that the two tests above are about something."""
    texts, numbers = ({key for key, kinds in KEYS.items() if kind in kinds} for kind in (str, int))
    assert {
        "model.path",
        "model.lora.start",
        "data.train.dataset",
        "logging.name",
        "eval.stop.metric",
    } <= texts
    assert {"rollout.plan.seeds", "training.seed", "eval.num_steps", "checkpoint.every"} <= numbers


def test_lists_without_entries_or_with_empty_ones():
    for value in ([], [""], ["attn.to_q", ""]):
        refused("model.lora.targets", value)
    with pytest.raises(UserError, match="^model.lora.targets: expected a list that is not empty"):
        parse_config(with_value("model.lora.targets", []))
    with pytest.raises(
        UserError, match="^rewards: expected keys that are texts and not empty, got ''"
    ):
        parse_config({**config_table(), "rewards": {"": 1.0}})
    with pytest.raises(UserError, match="^logging.name: expected a text that is not empty"):
        parse_config(with_value("logging.name", ""))


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"": 1.0},
        {"": {"type": "jpeg"}},
        {"x": {"type": ""}},
        {"jpeg": {"type": None}},
        {"jpeg": {"type": 0}},
        {"jpeg": {"type": []}},
        {"jpeg": None},
        {"jpeg": ""},
    ],
)
def test_rewards_without_a_name(section):
    with pytest.raises(UserError, match="^rewards"):
        parse_rewards(section)


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), float("inf"), float("nan"), "1", True, None, [1]]
)
def test_numbers_of_rewards(value):
    with pytest.raises(UserError, match="^rewards.jpeg: the weight must be a finite number"):
        parse_rewards({"jpeg": {"weight": value}})
    with pytest.raises(UserError, match="^rewards.http.timeout_s: expected a number"):
        build_reward("http", {"url": "http://127.0.0.1:1", "timeout_s": value})


# -------------------------------------------------------------------------------------------- twice
def places(value, path=()):
    """Paths of all tables in a JSON value that have a key."""
    if isinstance(value, dict):
        if value:
            yield path
        for key, inner in value.items():
            yield from places(inner, (*path, key))


WHOLE = config_table(model={"lora": {"rank": 4}}, training={"ema": {"decay": 0.5}})
PLACES = list(places(WHOLE))


def text_with_a_key_twice(value, path, n):
    """JSON of a value in which the table at `path` gives its n-th key twice."""
    if not isinstance(value, dict):
        return json.dumps(value), None
    pairs, name = [], None
    for key, inner in value.items():
        text, found = (
            text_with_a_key_twice(inner, path[1:], n)
            if path and path[0] == key
            else (json.dumps(inner), None)
        )
        name = f"{key}.{found}" if found else name
        pairs.append(f"{json.dumps(key)}: {text}")
    if not path:
        name = list(value)[n % len(value)]
        pairs.append(f"{json.dumps(name)}: null")
    return "{" + ", ".join(pairs) + "}", name


@given(st.sampled_from(PLACES), st.integers(0, 20))
@settings(max_examples=40)
def test_a_key_given_twice_is_named(path, n):
    text, name = text_with_a_key_twice(WHOLE, path, n)
    json.loads(text)  # Python's reader takes it
    with pytest.raises(strict_json.Refused) as error:
        strict_json.loads(text)
    assert str(error.value) == f"the key {name!r} is given twice"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_all_else_is_read_as_python_reads_it(value):
    assert strict_json.loads(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["", "{", "[1,]", "nan", '{"a" 1}', "[" * 100_000])
def test_what_is_no_json_is_still_none(text):
    with pytest.raises((ValueError, RecursionError)):
        strict_json.loads(text)


HALVES = ["\\ud83d", "a\\ude00", "\\ude00\\ud83d", "\\ud83d x"]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    "text, place",
    [
        ('"%s"', "it"),
        ('{"a": {"b": ["x", "%s"]}}', "a.b[1]"),
        ('{"%s": 1}', "a key"),
        ('{"a": {"%s": 1}}', "a key"),
    ],
)
def test_half_a_character_is_named_by_its_place(half, text, place):
    """In escapes, which is how programs write it; both halves together are one character."""
    with pytest.raises(
        strict_json.Refused, match=re.escape(f"{place} holds half a character (U+D")
    ):
        strict_json.loads(text % half)
    assert strict_json.loads(text % "\\ud83d\\ude00") == json.loads(text % "😀")


def test_half_a_character_in_a_config(tmp_path):
    """Also where only a library reads it, which would fail late, with a traceback."""
    file = tmp_path / "half.json"
    file.write_text(json.dumps(config_table(logging={"wandb": {"project": "\ud83d"}})))
    with pytest.raises(
        UserError, match=r"half\.json: logging\.wandb\.project holds half a character"
    ):
        load_config(file)
    for setting in ("logging.wandb.project=\udcff", 'logging.wandb={"project": "\\ud83d"}'):
        with pytest.raises(UserError, match="^--set logging.wandb.* holds half a character"):
            load_config(write_config(tmp_path), [setting])


def test_a_config_with_a_section_twice(tmp_path):
    file = tmp_path / "twice.json"
    file.write_text(json.dumps(config_table())[:-1] + ', "rollout": {"seeds": 3}}')
    with pytest.raises(UserError) as error:
        load_config(file)
    assert str(error.value) == f"config file {file}: the key 'rollout' is given twice"


def test_a_config_with_a_byte_order_mark(tmp_path):
    file = write_config(tmp_path)
    plain = load_config(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_config(file) == plain


@pytest.mark.parametrize(
    "settings, values, told",
    [
        (
            ["training.seed=1", "training.seed=2"],
            {"seed": 2},
            ["--set training.seed is given before --set training.seed=2"],
        ),
        (["training.seed=1", "training.iterations=5"], {"seed": 1, "iterations": 5}, []),
        (['training={"seed": 1}', "training.iterations=5"], {"seed": 1, "iterations": 5}, []),
        (
            ["training.seed=1", 'training={"iterations": 5}'],
            {"seed": 0, "iterations": 5},
            [
                '--set training.seed is given before --set training={"iterations": 5}, which'
                " replaces it"
            ],
        ),
        (
            ["training.seed=1", "training.seed=2", "training.seed=3"],
            {"seed": 3},
            ["--set training.seed=2", "--set training.seed=3"],
        ),
    ],
)
def test_of_settings_given_twice_the_last_counts_and_it_is_told(
    tmp_path, capsys, settings, values, told
):
    config = load_config(write_config(tmp_path), settings)
    assert {key: getattr(config.training, key) for key in values} == values
    lines = capsys.readouterr().err.splitlines()
    assert bool(lines) == bool(told) and all(
        any(words in line for line in lines) for words in told
    ), lines
    assert all(line.startswith("note: ") for line in lines)


@pytest.mark.parametrize(
    "setting, words",
    [
        ('rewards={"jpeg": 1, "jpeg": 2}', ["--set rewards", "'jpeg' is given twice"]),
        ("training.seed=" + "9" * 5000, ["--set training.seed", "digits"]),
        ("training.seed=" + "[" * 100_000, ["--set training.seed", "recursion"]),
        ("logging.name=", ["logging.name", "not empty"]),
        ("data.heldout=", ["data.heldout", "got ''"]),
        *(
            (name, [f"--set {name}: expected section.key=value"])
            for name in (".seed=1", "training.=1", "training..seed=1")
        ),
        ("training." + "x" * 10**6 + "=1", ["training.'xxx", "unknown key"]),
        ("deepspeed.zero_optimization.stage=true", ["deepspeed.zero_optimization", "True"]),
        ("x" * 10**6, ["--set xxx", "expected section.key=value"]),
        ("training.seed=" + "x" * 10**6, ["training.seed", "integer"]),
    ],
)
def test_settings_that_are_refused(tmp_path, setting, words):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path), [setting])
    assert all(word in str(error.value) for word in words) and len(str(error.value)) < 500, (
        error.value
    )


# ------------------------------------------------------------------------------------ command lines
@pytest.mark.parametrize(
    "read, good, bad",
    [
        (
            whole(1),
            ["1", "7", str(2**31 - 1)],
            ["0", "-1", str(2**31), "9" * 5000, "1.0", "1e3", "", " 1", "+1", "--1", "٣", "one"],
        ),
        (whole(-2, 2), ["-2", "0", "2"], ["-3", "3", "-"]),
        (steps, ["1", "1000"], ["0", "1001"]),
        (seed, ["0", str(2**63 - 1)], ["-1", str(2**63)]),
        (filled, ["a", " a "], ["", " ", "\t"]),
    ],
    ids=["count", "range", "steps", "seed", "text"],
)
def test_types_of_options(read, good, bad):
    from argparse import ArgumentTypeError

    for text in good:
        assert str(read(text)) == text
    for text in bad:
        with pytest.raises(ArgumentTypeError) as error:
            read(text)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "text", ["", ":", "2", "2:", "2:2", "4:2", "-1:2", "a:b", "1:" + "9" * 5000]
)
def test_the_profilers_iterations(text):
    with pytest.raises(UserError, match="expected START:STOP") as error:
        Profile(text)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "option, value",
    [
        ("--port", "-1"),
        ("--port", "65536"),
        ("--workers", "0"),
        ("--workers", "9" * 30),
        ("--threads", "0"),
        ("--batch", "-1"),
        ("--memory-mb", "0"),
        ("--token-env", ""),
        ("--gpus", ""),
    ],
)
def test_the_reward_servers_options(capsys, option, value):
    with pytest.raises(SystemExit) as end:
        reward_server.parse_args(["--reward", "jpeg", f"{option}={value}"])
    assert end.value.code == 2 and f"argument {option}: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, words",
    [
        ("ocr=", ["--reward ocr=", "not JSON"]),
        ('ocr={"detect": true, "detect": false}', ["'detect' is given twice"]),
        ("ocr=" + "[" * 100_000, ["not JSON"]),
        ("=", ["not JSON"]),
        ("", ["rewards", "name"]),
    ],
)
def test_the_reward_servers_rewards(text, words):
    with pytest.raises(UserError) as error:
        reward_server.read_reward(text)
    assert all(word in str(error.value) for word in words) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "key, value",
    [
        ("reward_pool.workers", 2000),
        ("reward_pool.threads_per_worker", 10**6),
        ("rollout.lanes", 2**30),
        ("reward_pool.timeout_s", 1e10),
        ("reward_pool.start_timeout_s", 1e300),
    ],
)
def test_what_is_made_or_waited_for_has_a_limit(key, value):
    """Processes and threads are made, so that too many end the machine; a timer of more than 292
    years is an OverflowError."""
    refused(key, value)
