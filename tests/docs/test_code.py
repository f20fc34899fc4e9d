"""Code in README and docs/: configs are accepted, scripts and their options exist, Python runs."""

import contextlib
import functools
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tempflow.config import Config, parse_config
from tempflow.registry import KINDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
sys.path.append(str(ROOT / "examples"))  # whose parts docs/extending.md names
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
BASE = {
    "model": {"path": "engine/tempflow/assets/tiny-flux"},
    "data": {
        "train": "engine/tempflow/assets/prompts/words_train.txt",
        "heldout": "engine/tempflow/assets/prompts/words_heldout.txt",
    },
    "rewards": {"jpeg": 1.0, "pickscore": 0},
    "deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}},
}
FOLDERS = "configs|engine|recipes|benchmarks|docs|examples|tests"
UNKNOWN = re.compile(r'"(?:my_\w+|geneval):\w+"')  # a reader's own modules


def fenced(page: Path, language: str) -> list[str]:
    return [
        text
        for _, kind, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if kind == language
    ]


def everywhere(language: str) -> list:
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, text in enumerate(fenced(page, language))
    ]


def members(text: str) -> list[tuple[str, object]]:
    """The keys and values of a fragment like `"rollout": {...}, "training": {...}`."""
    found, at, decoder = [], 0, json.JSONDecoder()
    while text[at:].strip(" \n,"):
        at += len(text[at:]) - len(text[at:].lstrip(" \n,"))
        key, at = decoder.raw_decode(text, at)
        at += re.match(r"\s*:\s*", text[at:]).end()
        value, at = decoder.raw_decode(text, at)
        found.append((key, value))
    return found


def variants(text: str) -> list[dict]:
    """The tables of a fragment, in which a key that comes again begins the next variant."""
    tables = [{}]
    for key, value in members(text):
        if key in tables[-1]:
            tables.append({})
        tables[-1][key] = value
    return tables


@pytest.mark.parametrize("text", everywhere("json"))
def test_configs_are_accepted(text):
    text = UNKNOWN.sub('"jpeg"', text)
    if text.lstrip().startswith("{"):
        table = json.loads(text)
        parse_config(table if "model" in table else BASE | table)
        return
    for table in variants(text):
        if set(table) <= set(Config.model_fields):
            merged = {key: {**BASE.get(key, {}), **value} for key, value in table.items()}
            merged.update({"rewards": table["rewards"]} if "rewards" in table else {})
            parse_config(BASE | merged)
        elif set(table) <= set(KINDS["reward"].ids):
            parse_config(BASE | {"rewards": table})
        else:
            judge = {"base_url": "http://127.0.0.1:8000/v1", "model": "judge"}
            parse_config(BASE | {"rewards": {"vlm_judge": judge | table}})


def test_prompt_lines_are_read(tmp_path):
    """And as JSON, so that no line has lost its prompt."""
    lines = [line for page in PAGES for text in fenced(page, "jsonl") for line in text.splitlines()]
    assert len(lines) > 5 and all(json.loads(line)["prompt"] for line in lines)


@functools.lru_cache
def options(command: str) -> set[str]:
    module, out = importlib.import_module(f"tempflow.commands.{command}"), io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        module.parse_args(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", out.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_commands_name_is_there(page):
    """Scripts, configs, and the options that follow a script or an installed command."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    if page.stem != "log":  # which says what was there
        for file in re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w/]+\.[a-z]+", text):
            theirs = page.stem in ("migration", "configs") and file.startswith("examples/")
            assert theirs or "NAME" in file or (ROOT / file).exists(), file
    for line in text.splitlines():
        for command, rest in re.findall(r"(?:engine/|tempflow-)([a-z_-]+)(?:\.py)?\b(.*)", line):
            command = command.replace("-", "_")
            if (ROOT / f"engine/{command}.py").exists():
                rest = re.split(r"`|  #| && | \| ", rest)[0]
                named = set(re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", rest))
                assert named <= options(command), f"{command}: {named - options(command)}"


def python(page: str) -> str:
    return "\n".join(fenced(ROOT / page, "python"))


@pytest.mark.slow
@pytest.mark.cpu
def test_python_runs(tmp_path):
    """README's lines, those of the training page with the run that they made, and diffusers' on the
    export, as a reader runs them in a clone; the run is shorter."""
    for name in ("configs", "engine"):
        (tmp_path / name).symlink_to(ROOT / name)
    short = ["training.iterations=1", "eval.prompts=4", "data.prompts_per_iteration=1"]
    shorter = ", ".join(f'"{change}"' for change in short)
    readme = python("README.md").replace('"training.minutes=2"', shorter)
    assert shorter in readme
    export = (
        "from tempflow.commands import export\n"
        'export.main(["--run", "runs/first", "--out", "model"])\n'
    )
    quick = fenced(ROOT / "docs/quickstart.md", "python")
    ends = "assert images.shape == (1, 32, 96, 3) and drawn[0].size == image.size == (96, 32)\n"
    text = "\n".join([readme, python("docs/training.md"), export, quick[0], quick[1], ends])
    (tmp_path / "reader.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "reader.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_python_of_extending_is_that_of_the_examples():
    """Which tests/engine/test_examples.py runs: each block is a part of one of their files."""
    files = [file.read_text(encoding="utf-8") for file in (ROOT / "examples").glob("*.py")]
    files += [
        file.read_text(encoding="utf-8") for file in (ROOT / "engine/tempflow/models").glob("*.py")
    ]
    blocks = fenced(ROOT / "docs/extending.md", "python")
    assert len(blocks) >= 4
    for block in blocks:
        assert any(block.strip() in text for text in files), block
