"""The engine from Python: training twice in one process, then evaluating and sampling; and the
console scripts."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from engine_cases import ROOT, config_table, examples, small_config
from pipelines_sd3 import sd3_pipeline
from run_cases import Run, file_apart
from setuptools.config.pyprojecttoml import read_configuration

import tempflow
from tempflow.config import load_config
from tempflow.errors import UserError
from tempflow.rewards import parse_rewards
from tempflow.run import directory, evaluation
from tempflow.training.session import build

CODE = """
import json, os, signal, sys
from pathlib import Path
import tempflow

table = json.loads(sys.argv[1])
# ignored where a shell started this in the background
handler, interrupt = lambda number, frame: None, signal.getsignal(signal.SIGINT)
signal.signal(signal.SIGTERM, handler)
first = tempflow.train(table)
second = tempflow.train(table, overrides=["logging.name=second", "rollout.replica=false"])
assert signal.getsignal(signal.SIGTERM) is handler and signal.getsignal(signal.SIGINT) is interrupt
assert "RANK" not in os.environ and "MASTER_PORT" not in os.environ
result = tempflow.evaluate(first["run_dir"], count=2)
both = tempflow.evaluate(first["run_dir"], count=2, compare=True)
base = tempflow.evaluate(first["run_dir"], count=2, base=True)
images = tempflow.sample(second["run_dir"], ["a word"], num_steps=2)
again = tempflow.sample(second["run_dir"], ["a word"], num_steps=2, base=True)
found = dict(first=first, second=second, result=result, base=base, both=both, shape=images.shape, dtype=str(images.dtype),
             differ=bool((images != again).any()))
Path(sys.argv[2]).write_text(json.dumps(found, default=str))
"""


def test_train_evaluate_and_sample(tmp_path):
    rollout = {"lanes": 1, "num_steps": 3, "plan": {"branch_steps": [0, 1]}}
    table = config_table(
        logging={"dir": str(tmp_path / "runs"), "name": "first"},
        eval={"prompts": 2},
        rollout=rollout,
    )
    file = tmp_path / "code.py"
    file.write_text(CODE)
    done = file_apart(file, json.dumps(table), tmp_path / "found.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("first", "second"):
        run = Run(tmp_path / "runs" / name)
        assert found[name] == {
            "run_dir": str(run.folder),
            **json.loads((run.folder / "summary.json").read_text()),
        }
        assert [row["iteration"] for row in run.rows] == [0, 1, 2] and found[name][
            "iterations"
        ] == 2
    assert found["first"]["tuned_reward"] == found["second"]["tuned_reward"]
    assert found["result"]["iteration"] == 2 and found["base"]["weights"] == "base"
    assert (
        found["both"]["reward"] == found["result"]["reward"]
        and found["both"]["base_reward"] == found["base"]["reward"]
    )
    assert found["both"]["drift/color_shift"] > 0
    assert found["result"]["prompts"] == found["result"]["scored"] == 2
    assert (
        found["shape"] == [1, table["rollout"]["height"], table["rollout"]["width"], 3]
        and found["dtype"] == "uint8"
    )
    assert found["differ"]


def test_sampling_a_run_is_sampling_its_session(tmp_path):
    """One assembly: the same size, guidance, steps, negative prompts and embeddings."""
    rollout, evaluation_table = (
        {"guidance_scale": 3.0, "height": 32, "width": 64},
        {"guidance_scale": 1.5, "num_steps": 3},
    )
    logging, data = (
        {"dir": str(tmp_path / "runs"), "name": "one"},
        {"embedding_cache": str(tmp_path / "cache")},
    )
    model = {"path": str(sd3_pipeline(tmp_path / "sd3")), "max_sequence_length": 12}
    config = small_config(
        model=model, data=data, rollout=rollout, eval=evaluation_table, logging=logging
    )
    directory.claim(config, resume=False)
    prompts = examples(["a word", "two words"])
    session = build(config, prompts, [], parse_rewards(config.rewards), train=False)
    (_, wanted, _), *rest = evaluation.draw(session, prompts, [0, 1], seed=5)
    assert not rest and session.runtime is None and session.float8 is None
    found = tempflow.sample(tmp_path / "runs/one", ["a word", "two words"], base=True, seed=5)
    assert found.shape == (2, 32, 64, 3) and np.array_equal(found, wanted)


@pytest.mark.parametrize(
    "table, words",
    [
        (config_table(), ["logging.name", "required"]),
        (
            config_table(training={"itterations": 2}, logging={"name": "a"}),
            ["training.itterations", "did you mean"],
        ),
        (config_table(training={"seed": {1}}), ["JSON", "set"]),
    ],
)
def test_a_table_that_is_refused(table, words):
    with pytest.raises(UserError) as error:
        tempflow.train(table)
    assert all(word in str(error.value) for word in words)


def test_a_table_is_not_changed(tmp_path):
    table = config_table(logging={"dir": tmp_path, "name": "a"})
    before = {section: dict(keys) for section, keys in table.items()}
    assert load_config(table, ["training.seed=7"]).training.seed == 7
    assert table == before and load_config(table).logging.dir == str(tmp_path)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"checkpoint": "newest"}, ["checkpoint", "best"]),
        ({"weights": "average"}, ["weights", "raw"]),
        ({"num_steps": 0}, ["num_steps"]),
        ({"seed": -1}, ["seed"]),
        ({"prompts": "a word"}, ["prompts", "list"]),
        ({"prompts": []}, ["prompts", "list"]),
        ({}, ["config.json"]),
    ],
)
def test_arguments_that_are_refused(tmp_path, arguments, words):
    with pytest.raises(UserError) as error:
        tempflow.sample(tmp_path, **{"prompts": ["a word"], **arguments})
    assert all(word in str(error.value) for word in words)


def console_scripts() -> dict[str, str]:
    return read_configuration(ROOT / "pyproject.toml")["project"]["scripts"]


def test_console_scripts(capsys):
    """Each is a command of its own module, whose options `main` reads from what it is given;
    engine/ has a script for each."""
    scripts = console_scripts()
    assert {target.partition(":")[0].rpartition(".")[2] for target in scripts.values()} == {
        p.stem for p in (ROOT / "engine").glob("*.py")
    }
    for name, target in scripts.items():
        module, _, command = target.partition(":")
        module = importlib.import_module(module)
        assert callable(getattr(module, command)) and name == "tempflow-" + Path(
            module.__file__
        ).stem.replace("_", "-")
        with pytest.raises(SystemExit) as end:
            module.main(["--help"])
        assert end.value.code == 0 and "usage:" in capsys.readouterr().out
