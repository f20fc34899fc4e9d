"""Prompt files, and the order in which prompts are drawn."""

import hashlib
import json
import sys
from collections import Counter

import numpy as np
import pytest
from engine_cases import HELDOUT, PROMPTS, config_table
from hypothesis import given
from hypothesis import strategies as st

import words as word_recipe
from tempflow.config import HubDataset, load_config, parse_config
from tempflow.data.prompts import (
    LONGEST,
    PromptOrder,
    check_unchanged,
    digests,
    load_prompts,
    typed_prompts,
)
from tempflow.errors import UserError
from tempflow.rewards.quotes import quoted_text
from tempflow.types import Example


def written(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_text_file(tmp_path):
    file = written(tmp_path, "p.txt", '  a shop "OPEN"  \n\n   \nein Café\n')
    assert load_prompts(file) == [
        Example('a shop "OPEN"', metadata={"source": f"{file}:1"}),
        Example("ein Café", metadata={"source": f"{file}:4"}),
    ]


def test_jsonl_file(tmp_path):
    file = written(tmp_path, "p.jsonl", '{"prompt": "a", "tag": 3}\n\n{"prompt": "b"}\n')
    assert load_prompts(file) == [
        Example("a", metadata={"tag": 3, "source": f"{file}:1"}),
        Example("b", metadata={"source": f"{file}:3"}),
    ]


def test_shipped_prompts():
    """They are what the recipe makes of seed 0, and no word is in two files."""
    files = {
        name: load_prompts(PROMPTS.with_name(f"words_{name}.txt"))
        for name in word_recipe.word_lists()
    }
    read = {name: [quoted_text(p.text) for p in prompts] for name, prompts in files.items()}
    assert read == word_recipe.word_lists()
    assert {name: len(set(found)) for name, found in read.items()} == {
        "train": 4000,
        "heldout": 512,
        "final": 256,
    }
    assert len(set().union(*read.values())) == 4000 + 512 + 256


def test_the_first_held_out_words_stay():
    """Numbers on the first 128 are compared with those from before there were more."""
    text = "".join(p.text + "\n" for p in load_prompts(HELDOUT)[: word_recipe.FIRST_HELDOUT])
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "84f9fb53566e97880f86544ab51d93a5f42859ba9230ea2f5b8027dc228b4632"
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.txt", None, ["does not exist"]),
        ("p.csv", "a", [".txt or .jsonl"]),
        ("p.txt", "", ["holds no prompts"]),
        ("p.txt", " \n\t\n", ["holds no prompts"]),
        ("p.txt", b"\xff\xfe", ["cannot read"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', [":2", "not JSON"]),
        ("p.jsonl", '{"text": "a"}', [":1", '"prompt"', "keys: text"]),
        ("p.jsonl", '{"prompt": "  "}', [":1", "non-empty"]),
        ("p.jsonl", '{"prompt": 3}', [":1", '"prompt"']),
        ("p.jsonl", '["a"]', [":1", "object"]),
        ("p.jsonl", "[" * 100_000, [":1", "not JSON"]),
        (
            "p.jsonl",
            '{"prompt": "a", "negative_prompt": ["b"]}',
            [":1", '"negative_prompt"', "['b']"],
        ),
        # in another encoding
        ("p.txt", "a barn\na fox".encode("utf-16-le"), [":1", "not UTF-8 text", "UTF-16"]),
        ("P.TXT", "a barn\n\na fox\n".encode("utf-16-be"), [":1", "not UTF-8 text"]),
        ("p.jsonl", '{"prompt": "a"}\n'.encode("utf-32-le"), [":1", "not UTF-8 text"]),
        ("p.txt", "fine\na \x93quoted\x94 word\n", [":2", "control character U+0093", "UTF-8"]),
        ("p.txt", "a \x1b[31mred\x1b[0m barn", [":1", "U+001B"]),
        ("p.jsonl", r'{"prompt": "a\u0000b"}', [":1", "U+0000"]),
        (
            "p.jsonl",
            '{"prompt": "a"}\n' + r'{"prompt": "a smile \ud83d"}',
            [":2", "half a character (U+D83D)"],
        ),
        (
            "p.jsonl",
            r'{"prompt": "a smile", "negative_prompt": "\ude00"}',
            [":1", "half a character (U+DE00)"],
        ),
        (
            "p.jsonl",
            r'{"prompt": "a smile", "tags": {"list": ["\ud83d"]}}',
            [":1", "half a character (U+D83D)"],
        ),
        # twice
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', [":1", "'prompt' is given twice"]),
        (
            "p.jsonl",
            '{"prompt": "a", "box": {"x": 1, "y": 2, "x": 3}}',
            [":1", "'box.x' is given twice"],
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "boxes": [{"x": 1}, {"x": 1, "x": 1}]}',
            [":1", "'boxes[1].x' is given twice"],
        ),
    ],
)
def test_refused(tmp_path, name, content, words):
    file = tmp_path / name
    if content is not None:
        written(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        load_prompts(file, "data.heldout")
    assert all(word in str(error.value) for word in [str(file), *words]), error.value
    if not any(word.startswith(":") for word in words):
        assert str(error.value).startswith("data.heldout: ")


def test_refusals_are_short(tmp_path):
    """Whatever the line holds."""
    for name, line in (
        ("p.jsonl", '{"prompt": ["' + "x" * 10**6 + '"]}'),
        ("p.jsonl", '["' + "x" * 10**6 + '"]'),
        ("p.jsonl", '{"' + "x" * 10**6 + '": 1}'),
        ("p.jsonl", "x" * 10**6),
        ("p.txt", "x" * 10**6 + "\x01"),
    ):
        with pytest.raises(UserError) as error:
            load_prompts(written(tmp_path, name, line))
        assert f"{tmp_path}/{name}:1" in str(error.value) and len(str(error.value)) < 500


def test_what_a_prompt_may_hold(tmp_path):
    """Line ends inside a JSON text, tabs, whole emoji (also as the two halves that JSON writes),
    joiners, any script."""
    texts = ["two\nlines\r\nhere", "a\ttab", "😀 and 👩\u200d🌾", "ｆｕｌｌ 幅", "עברית\u200e"]
    file = written(
        tmp_path, "p.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    )
    assert r"\ud83d\ude00" in file.read_text() and [p.text for p in load_prompts(file)] == texts


def test_endings_in_capitals(tmp_path):
    for name, content in (("A.TXT", "a barn"), ("b.JsonL", '{"prompt": "a barn"}')):
        assert [p.text for p in load_prompts(written(tmp_path, name, content))] == ["a barn"]
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder, "Train.TXT", "a fox")
    assert [p.text for p in load_prompts(folder)] == ["a fox"]


def test_a_spreadsheets_quoting_is_taken_off(tmp_path, capsys):
    """Where it can be nothing else: the line is quoted as a whole and doubles the marks inside. It
    is told."""
    lines = [
        '"a cup, white, that says ""TEA"""',
        "a plain line",
        '"""TEA"" on a cup, white"',
        '"all of it, once"',
        '""TEA"" on a cup',
        '"TEA" and ""',
        '""',
    ]
    file = written(tmp_path, "p.txt", "\r\n".join(lines))
    found = [p.text for p in load_prompts(file, "--prompts")]
    assert found == [
        'a cup, white, that says "TEA"',
        "a plain line",
        '"TEA" on a cup, white',
        *lines[3:],
    ]
    assert (
        capsys.readouterr().err
        == "note: --prompts: prompts read without the quoting of a spreadsheet: 2, the first at"
        f" {file}:1\n"
    )
    load_prompts(written(tmp_path, "q.jsonl", json.dumps({"prompt": lines[0]})))
    assert capsys.readouterr().err == ""


def test_long_prompts_are_cut_and_told(tmp_path, capsys):
    whole = "x" * LONGEST
    file = written(tmp_path, "p.txt", f"{whole}\n{whole}y\n\n{'z' * 10**6}\n")
    assert [p.text for p in load_prompts(file)] == [whole, whole, "z" * LONGEST]
    assert (
        capsys.readouterr().err
        == f"note: data.train: prompts cut to {LONGEST} characters: 2, the first at {file}:2\n"
    )


def test_prompts_of_a_command_line_are_held_to_the_same():
    assert typed_prompts(["a", "b"], "--prompt") == [Example("a"), Example("b")]
    for bad in ("cut \ud83d", "a\x00b", " "):
        with pytest.raises(UserError, match="^--prompt: "):
            typed_prompts(["a", bad], "--prompt")


@pytest.mark.parametrize(
    "names, words",
    [
        ([], ["none of train.txt, train.jsonl, train_metadata.jsonl"]),
        (["test.txt", "train.csv"], ["none of train.txt"]),
        (
            ["train.txt", "train_metadata.jsonl"],
            ["holds train.txt and train_metadata.jsonl", "exactly one"],
        ),
    ],
)
def test_folder_without_one_file_of_the_split(tmp_path, names, words):
    for name in names:
        written(tmp_path, name, "a")
    with pytest.raises(UserError) as error:
        load_prompts(tmp_path)
    assert all(word in str(error.value) for word in [f"data.train: folder {tmp_path}", *words])


def test_folders_as_flow_grpo_and_flow_factory_lay_them_out(tmp_path):
    """The split is the key's; GenEval's metadata stay as they are, for its reward."""
    entry = {
        "tag": "counting",
        "include": [{"class": "bench", "count": 2}],
        "exclude": [{"class": "bench", "count": 3}],
    }
    (tmp_path / "geneval").mkdir()
    for split in ("train", "test"):
        line = json.dumps({**entry, "prompt": f"a photo of two benches, {split}"})
        written(tmp_path / "geneval", f"{split}_metadata.jsonl", line + "\n")
        written(tmp_path, f"{split}.txt", f"{split} prompt")
    for key, split in (("data.train", "train"), ("data.heldout", "test"), ("--prompts", "test")):
        assert [p.text for p in load_prompts(tmp_path, key)] == [f"{split} prompt"]
        (prompt,) = load_prompts(tmp_path / "geneval", key)
        source = f"{tmp_path}/geneval/{split}_metadata.jsonl:1"
        assert prompt == Example(
            f"a photo of two benches, {split}", metadata={**entry, "source": source}
        )


def test_negative_prompts(tmp_path):
    lines = [
        '{"prompt": "a", "negative_prompt": "blurred"}',
        '{"prompt": "b", "negative_prompt": ""}',
        '{"prompt": "c", "negative_prompt": null}',
        '{"prompt": "d"}',
    ]
    prompts = load_prompts(written(tmp_path, "p.jsonl", "\n".join(lines)))
    assert [p.negative for p in prompts] == ["blurred", "", None, None]
    assert all(p.metadata.keys() == {"source"} for p in prompts)


def test_what_editors_leave_in_a_file(tmp_path):
    """Byte order marks (of joined files too, and inside pasted text), Windows' line ends, and
    separators that end no line: Unicode's may stand in a JSON text."""
    file = written(tmp_path, "p.txt", "\ufeffone\r\ntwo\u2028still two\r\n")
    assert [(p.text, p.metadata["source"]) for p in load_prompts(file)] == [
        ("one", f"{file}:1"),
        ("two\u2028still two", f"{file}:2"),
    ]
    file = written(tmp_path, "q.txt", '\ufeffone\n\ufeff"two ""2"""\n\ufeff\nthree\ufeff, four\n')
    assert [p.text for p in load_prompts(file)] == ["one", 'two "2"', "three, four"]
    file = written(tmp_path, "p.jsonl", '{"prompt": "a\u2028b"}\r\n\ufeff{"prompt": "c"}')
    assert [p.text for p in load_prompts(file)] == ["a\u2028b", "c"]


# ----------------------------------------------------------------------------------------- datasets
ROWS = [
    {"caption": "a red cube", "negative_prompt": "blue", "tag": 1, "extra": "x"},
    {"caption": "two dogs", "negative_prompt": None, "tag": 2, "extra": "y"},
]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder that `datasets.load_dataset` reads; its cache stays in the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "dataset"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")
    datasets.Dataset.from_list([{"caption": "a"}, {"caption": " "}]).to_parquet(
        folder / "test.parquet"
    )
    return folder


def test_dataset(dataset):
    given = HubDataset(dataset=str(dataset), column="caption", metadata=["tag"])
    assert load_prompts(given) == [
        Example("a red cube", "blue", metadata={"tag": 1, "source": f"{dataset}[train]:0"}),
        Example("two dogs", metadata={"tag": 2, "source": f"{dataset}[train]:1"}),
    ]


def test_dataset_is_named_in_a_config(dataset, tmp_path):
    """Looked up from the config file's folder, as files are."""
    table = config_table(
        data={"train": {"dataset": "dataset", "column": "caption"}, "heldout": None}
    )
    config = load_config(written(tmp_path, "c.json", json.dumps(table)))
    assert config.data.train.dataset == str(dataset) and len(load_prompts(config.data.train)) == 2
    assert parse_config(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"column": "prompt"},
            ["data.heldout.column", "has no column prompt", "caption, negative_prompt, tag, extra"],
        ),
        ({"metadata": ["tag", "size"]}, ["data.heldout.metadata", "has no column size"]),
        ({"split": "validation"}, ["data.heldout", "validation", "ValueError"]),
        ({"split": "test"}, ["[test]:1", "non-empty", "caption"]),
        ({"dataset": "/no/such/folder"}, ["data.heldout", "/no/such/folder"]),
    ],
)
def test_dataset_refused(dataset, changes, words):
    given = HubDataset(**{"dataset": str(dataset), "column": "caption", **changes})
    with pytest.raises(UserError) as error:
        load_prompts(given, "data.heldout")
    assert all(word in str(error.value) for word in words), error.value


def test_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match="data.train: a dataset needs the package datasets .*pip install datasets"
    ):
        load_prompts(HubDataset(dataset="a/b"))


# -------------------------------------------------------------------------------------------- order
sizes = st.integers(1, 40).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count)))


@given(sizes, st.integers(0, 100))
def test_an_epoch_holds_no_prompt_twice(size, seed):
    count, per_iteration = size
    order = PromptOrder(count, per_iteration, seed)
    per_epoch = count // per_iteration
    for epoch in range(3):
        drawn = [i for place in range(per_epoch) for i in order.indices(epoch * per_epoch + place)]
        assert len(drawn) == per_epoch * per_iteration == len(set(drawn))
        assert all(type(i) is int and 0 <= i < count for i in drawn)


@given(sizes, st.integers(0, 100), st.integers(0, 200))
def test_the_order_has_no_memory(size, seed, iteration):
    """What an iteration draws does not depend on what was drawn before: a resumed run sees the
    same."""
    order = PromptOrder(*size, seed)
    for earlier in (iteration + 3, 0, iteration):
        order.indices(earlier)
    assert order.indices(iteration) == PromptOrder(*size, seed).indices(iteration)


@given(sizes, st.integers(0, 100), st.integers(0, 50))
def test_what_a_run_may_reach(size, seed, iterations):
    order = PromptOrder(*size, seed)
    drawn = {i for iteration in range(iterations) for i in order.indices(iteration)}
    reached = order.reached(iterations)
    assert drawn <= set(reached) and (len(drawn) == len(reached) or len(reached) == size[0])


def test_epochs_and_seeds_differ():
    order, other = PromptOrder(40, 20, 0), PromptOrder(40, 20, 1)
    first, second = [order.indices(0) + order.indices(1), order.indices(2) + order.indices(3)]
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert first != list(range(40)) and other.indices(0) != order.indices(0)


def test_every_prompt_is_reached():
    order = PromptOrder(10, 4, 0)  # 2 of 10 are left out of each epoch, not always the same
    seen = Counter(i for iteration in range(60) for i in order.indices(iteration))
    assert set(seen) == set(range(10))


def test_more_prompts_an_iteration_than_there_are():
    with pytest.raises(
        UserError, match="data.prompts_per_iteration: 5, but data.train holds only 4"
    ):
        PromptOrder(4, 5, 0)


# ----------------------------------------------------------------------------------------- resuming
CHANGED = {
    "a word": [Example("a"), Example("c")],
    "the order": [Example("b"), Example("a")],
    "one more": [Example("a"), Example("b"), Example("c")],
    "a negative": [Example("a"), Example("b", negative="blur")],
    "a condition image": [Example("a"), Example("b", images=(np.zeros((2, 2, 3), np.uint8),))],
    "none": [],
}


@pytest.mark.parametrize("other", CHANGED.values(), ids=CHANGED)
def test_other_prompts_are_known(other):
    same, moved = (
        [Example("a"), Example("b")],
        [Example("a", metadata={"source": "elsewhere:1"}), Example("b")],
    )
    check_unchanged(digests(same, same), digests(moved, moved))
    check_unchanged({}, digests(other, same))  # of a version that kept no digests
    with pytest.raises(UserError, match="--resume: data.train holds other prompts"):
        check_unchanged(digests(same, same), digests(other, same))
    with pytest.raises(UserError, match="--resume: data.heldout holds other prompts"):
        check_unchanged(digests(same, same), digests(same, other))
