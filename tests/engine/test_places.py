"""A run is found from any working directory, and after it was moved, alone or together with what it
names."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from engine_cases import HELDOUT, MODEL, PROMPTS
from run_cases import environment, script_here

from tempflow import arguments, cli
from tempflow.config import load_config
from tempflow.errors import UserError
from tempflow.run import directory, places

REWARD = (
    "def brightness(images, prompts, metadata):\n    return [float(image.mean()) for image in"
    " images]\n"
)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder as a user has it: model, prompts, a module of one's own, and a config with relative
    paths."""
    root = tmp_path / "clone"
    for name in ("models/small", "models/judge", "adapters"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text(name)
    for name in ("train.txt", "heldout.txt", "rubric.txt", "one.json"):
        (root / name).write_text(f'the word "{name}"\n' * 3)
    (root / "my_rewards_here.py").write_text(REWARD)
    table = {
        "model": {"path": "models/small", "lora": {"start": "adapters"}},
        "data": {
            "train": "train.txt",
            "heldout": {"dataset": "models"},
            "prompts_per_iteration": 1,
            "embedding_cache": "cache",
        },
        "rewards": {
            "jpeg": {
                "path": "models/judge",
                "rubric_file": "rubric.txt",
                "base": "openai/clip",
                "model": "adapters",
            }
        },
        "deepspeed": {"optimizer": {"type": "SGD"}},
    }
    (root / "one.json").write_text(json.dumps(table))
    monkeypatch.chdir(root)
    return root


def begun(config_file="one.json", *overrides) -> Path:
    return directory.claim(load_config(config_file, list(overrides)), resume=False).absolute()


def named(run_dir: Path) -> dict:
    config = directory.read_config(run_dir)
    options = config.rewards["jpeg"]
    return {
        "model": config.model.path,
        "start": config.model.lora.start,
        "train": config.data.train,
        "heldout": config.data.heldout.dataset,
        "cache": config.data.embedding_cache,
        "path": options["path"],
        "rubric": options["rubric_file"],
    }


def expected(root: Path) -> dict:
    names = {
        "model": "models/small",
        "start": "adapters",
        "train": "train.txt",
        "heldout": "models",
        "cache": "cache",
        "path": "models/judge",
        "rubric": "rubric.txt",
    }
    return {key: str(root / name) for key, name in names.items()}


RUNS = {
    "in the clone": [],
    "deep": ["logging.name=a/b/c"],
    "elsewhere": ["logging.dir=../scratch"],
    "absolute": ["logging.dir={}/far"],
}


@pytest.mark.parametrize("where", RUNS.values(), ids=RUNS)
def test_from_any_working_directory(clone, tmp_path, monkeypatch, where):
    run_dir = begun("one.json", *(text.format(tmp_path) for text in where))
    for folder in (tmp_path, "/", run_dir):
        monkeypatch.chdir(folder)
        assert named(Path(os.path.relpath(run_dir))) == expected(clone)
    options = directory.read_config(run_dir).rewards["jpeg"]
    assert options["base"] == "openai/clip" and options["model"] == "adapters", (
        "what is no path stays"
    )


def moved(tmp_path, how) -> Path:
    how(tmp_path / "clone", tmp_path / "new")
    return tmp_path / "new"


@pytest.mark.parametrize(
    "how",
    [shutil.move, shutil.copytree, lambda old, new: (shutil.move(old, new), old.symlink_to(new))],
    ids=["moved", "copied", "linked"],
)
def test_the_clone_was_moved(clone, tmp_path, monkeypatch, how):
    run_dir = begun()
    monkeypatch.chdir(tmp_path)
    root = moved(tmp_path, how)
    there = root / run_dir.relative_to(clone)
    assert {key: os.path.realpath(path) for key, path in named(there).items()} == expected(root)
    monkeypatch.chdir(root)
    config = load_config("one.json")
    assert directory.claim(config, resume=True).absolute() == there
    again = load_config(there / "config.json")
    assert directory.path_of(again).samefile(there) and os.path.realpath(again.model.path) == str(
        root / "models/small"
    )


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_the_run_alone_was_moved(clone, tmp_path, monkeypatch, through):
    run_dir = begun()
    shutil.move(run_dir, tmp_path / "archive/renamed")
    there = tmp_path / "archive/renamed"
    if through == "a link":
        (tmp_path / "link").symlink_to(there)
        there = tmp_path / "link"
    monkeypatch.chdir("/")
    assert named(there) | {"cache": ""} == expected(clone) | {"cache": ""}, (
        "what is made anew may lie anywhere"
    )
    again = load_config(there / "config.json")
    assert directory.claim(again, resume=True) == there


def test_runs_behind_a_link(clone, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    (clone / "runs").symlink_to(tmp_path / "scratch")
    run_dir = begun()
    monkeypatch.chdir("/")
    assert named(run_dir) == named(tmp_path / "scratch/one") == expected(clone)
    root = moved(tmp_path, shutil.move)
    assert named(root / "runs/one") == expected(root)


def test_a_run_of_an_older_version(clone, monkeypatch):
    """Its config.json has the paths as they were given; they are found above the run."""
    run_dir = begun()
    table = json.loads((clone / "one.json").read_text())
    (run_dir / "config.json").write_text(
        json.dumps({**table, "logging": {"dir": "runs", "name": "one"}})
    )
    monkeypatch.chdir("/")
    found = named(run_dir)
    assert found | {"cache": ""} == expected(clone) | {"cache": ""}
    monkeypatch.chdir(clone)
    assert directory.claim(load_config("one.json"), resume=True).absolute() == run_dir


def test_resuming_with_other_files_is_refused(clone):
    begun()
    shutil.copy("train.txt", "other.txt")
    with pytest.raises(UserError, match="--resume: data.train is .*other.txt.*train.txt"):
        directory.claim(load_config("one.json", ["data.train=other.txt"]), resume=True)


def test_modules_of_the_start_folder(clone, tmp_path, monkeypatch):
    """Also after a resume from another folder, and where the clone was moved."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    run_dir = begun()
    monkeypatch.chdir(tmp_path)
    directory.claim(load_config(run_dir / "config.json"), resume=True)
    root = moved(tmp_path, shutil.move)
    sys.path[:] = before
    directory.find_modules(root / "runs/one")
    assert str(root) in sys.path and str(clone) not in sys.path
    directory.find_modules(tmp_path / "nowhere")


def test_evaluating_a_moved_clone_from_elsewhere(clone, tmp_path, monkeypatch):
    shutil.rmtree("models/small")
    shutil.copytree(MODEL, "models/small")
    for source, name in ((PROMPTS, "train.txt"), (HELDOUT, "heldout.txt")):
        shutil.copy(source, name)
    table = {
        "model": {"path": "models/small", "max_sequence_length": 20},
        "data": {"train": "train.txt", "heldout": "heldout.txt"},
        "rollout": {"height": 32, "width": 96, "guidance_scale": 0.0},
        "rewards": {"my_rewards_here:brightness": 1.0},
        "reward_pool": {"workers": 0},
        "eval": {"prompts": 1, "num_steps": 1},
        "deepspeed": {"optimizer": {"type": "SGD"}},
    }
    (clone / "one.json").write_text(json.dumps(table))
    begun()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    root = moved(tmp_path, shutil.move)
    done = script_here("evaluate", "--run", root / "runs/one", "--base")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["reward"] > 0
    sys.modules.pop("my_rewards_here", None)


# --------------------------------------------------------------------------------------------- home
@pytest.mark.parametrize(
    "key",
    [
        "model.path",
        "data.train",
        "data.heldout",
        "data.embedding_cache",
        "logging.dir",
        "model.lora.start",
    ],
)
def test_home_is_put_in_or_missed(clone, tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    changed = load_config("one.json", [f"{key}=~/clone/adapters"]).model_dump()
    for part in key.split("."):
        changed = changed[part]
    assert changed == str(clone / "adapters")
    with pytest.raises(UserError, match=rf"{key}: ~no-such-user/x begins with ~"):
        load_config("one.json", [f"{key}=~no-such-user/x"])


def test_home_on_a_command_line(tmp_path, monkeypatch):
    """A shell leaves --out=~/new as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert arguments.path("~/new") == tmp_path / "new" and arguments.path("./a/~") == Path("a/~")
    for unknown in ("~no-such-user/x", "~" + "x" * 9999):
        with pytest.raises(ArgumentTypeError, match="begins with ~") as error:
            arguments.path(unknown)
        assert len(str(error.value)) < 300


def test_tables_of_any_shape_are_left_to_the_config():
    for table in (
        {},
        {"model": 1},
        {"data": {"train": 5}},
        {"rewards": ["a"]},
        {"rewards": {"a": 1}},
        {"model": {"lora": "x"}},
    ):
        before = json.dumps(table)
        for function in (places.expanded, places.absolute, places.resolved):
            function(table)
        assert json.dumps(table) == before


@pytest.mark.parametrize("writable", [True, False])
def test_compiled_code_is_kept_in_the_home_or_where_there_is_room(tmp_path, monkeypatch, writable):
    """As in a container whose user may not write its home."""
    home = "/proc" if not writable else str(tmp_path / "home")
    for name in (
        caches := [
            "TORCHINDUCTOR_CACHE_DIR",
            "TRITON_HOME",
            "TRITON_CACHE_DIR",
            "TORCH_EXTENSIONS_DIR",
        ]
    ):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cli._choose_caches()
    chosen = [os.environ.get(name) for name in caches]
    if writable:
        assert chosen == [f"{home}/.cache/tempflow/inductor", None, None, None]
    else:
        assert all(
            Path(place).is_relative_to(tmp_path / f"tempflow-home-{os.getuid()}")
            for place in chosen
        )
    assert os.environ["HOME"] == home, "paths that begin with ~ mean what they did"


def test_a_process_without_a_home_gets_one_elsewhere(tmp_path, monkeypatch):
    """As in a container whose user has no name."""
    code = (
        "import os; from tempflow import cli; cli._ensure_home(); print(os.path.expanduser('~/x'))"
    )
    env = {**environment(), "TMPDIR": str(tmp_path)}
    env.pop("HOME")
    unknown = (
        f"import os, pwd; pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid)); {code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", unknown], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    home = tmp_path / f"tempflow-home-{os.getuid()}"
    assert done.stdout.strip() == str(home / "x") and os.listdir(tmp_path) == [home.name], (
        done.stderr
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "HOME": "relative"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(home / "x"), done.stderr
    monkeypatch.setenv("HOME", str(tmp_path))
    cli._ensure_home()
    assert os.environ["HOME"] == str(tmp_path)
