"""metrics.jsonl: strict JSON, on disk at once, whole after any crash; trackers: copies of it."""

import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest

from tempflow.errors import UserError
from tempflow.run.logs import MetricsLog, read_metrics, write_atomic
from tempflow.run.trackers import Trackers, image_grid


def test_rows_are_on_disk_after_append(tmp_path):
    log = MetricsLog(tmp_path / "runs" / "new")
    log.append({"iteration": 1, "reward/mean": 0.5, "text": "ü", "flag": None})
    assert read_metrics(tmp_path / "runs" / "new") == [
        {"iteration": 1, "reward/mean": 0.5, "text": "ü", "flag": None}
    ]


def test_nan_and_infinity_become_null_and_arrays_numbers(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.append(
            {
                "iteration": np.int64(1),
                "a": math.nan,
                "b": -math.inf,
                "c": np.float32(0.5),
                "d": np.float32("nan"),
            }
        )
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line.endswith("\n") and "NaN" not in line and "Infinity" not in line
    assert json.loads(line) == {"iteration": 1, "a": None, "b": None, "c": 0.5, "d": None}


def test_tensors_are_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    with MetricsLog(tmp_path) as log:
        log.append({"iteration": 1, "loss": torch.tensor(0.25)})
    assert read_metrics(tmp_path)[0]["loss"] == 0.25


def test_truncate_after_drops_later_rows_and_appends_go_on(tmp_path):
    with MetricsLog(tmp_path) as log:
        for iteration in range(6):
            log.append({"iteration": iteration})
        log.truncate_after(3)
        log.append({"iteration": 4, "again": True})
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 30))
def test_any_cut_of_the_last_line_is_left_out_with_its_name(tmp_path, cut):
    first, last = b'{"iteration": 1}\n', b'{"iteration": 2, "x": "\xc3\xbc"}\n'
    cut = min(cut, len(last) - 2)
    (tmp_path / "metrics.jsonl").write_bytes(first + last[:cut])
    with pytest.warns(UserWarning, match="metrics.jsonl, line 2: half-written"):
        assert read_metrics(tmp_path) == [{"iteration": 1}]
    with MetricsLog(tmp_path) as log:
        log.append({"iteration": 2})
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 2]


def test_whole_last_line_without_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}')
    assert len(read_metrics(tmp_path)) == 2
    with MetricsLog(tmp_path) as log:
        log.append({"iteration": 3})
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_bad_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\nnot json\n{"iteration": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        read_metrics(tmp_path)


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_importing_needs_no_torch_or_tracker():
    code = (
        "import sys, tempflow.run.logs, tempflow.run.trackers, tempflow.run.console,"
        " tempflow.run.report; print([m for m in ('torch', 'tensorboard', 'wandb', 'plotly') if m"
        " in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_tensorboard_gets_scalars_and_a_grid(run_factory):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_dir = run_factory(iterations=3, sets=(0,))
    with Trackers(run_dir, tensorboard=True) as trackers:
        trackers.begin(after=-1)
        for row in read_metrics(run_dir):
            trackers.log({**row, "bad": math.nan, "word": "x"})
        trackers.samples(run_dir / "samples/000000")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3]
    assert not {"bad", "word", "iteration"} & set(events.Tags()["scalars"])
    image = events.Images("samples")[0]
    assert (image.width, image.height) == (8 * 98, 4 * 34)


def fake_wandb(calls):
    run = types.SimpleNamespace(
        log=calls.append,
        define_metric=lambda *a, **k: None,
        finish=lambda: calls.append("finished"),
    )
    return types.SimpleNamespace(
        init=lambda **options: calls.append(options) or run,
        Image=lambda picture, caption: ("image", picture.size, caption),
    )


def test_wandb_gets_config_scalars_and_grid_and_resumes(run_factory, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    run_dir = run_factory("demo", iterations=2, sets=(0,))
    with Trackers(run_dir, wandb={"project": "p"}) as trackers:
        trackers.log({"iteration": 1, "loss": 0.5, "kl": None})
        trackers.samples(run_dir / "samples/000000")
    Trackers(run_dir, wandb={"project": "p", "name": "mine"})
    first, again = calls[0], calls[-1]
    assert (
        first["project"] == "p"
        and first["name"] == "demo"
        and first["config"]["rollout"]["plan"]["children"] == 6
    )
    assert calls[1] == {"iteration": 1, "loss": 0.5} and calls[2]["samples"][2].startswith(
        '1. the word "'
    )
    assert calls[3] == "finished" and again["id"] == first["id"] and again["name"] == "mine"


@pytest.mark.parametrize(
    "module, options, package",
    [
        ("wandb", {"wandb": {}}, "wandb"),
        ("torch.utils.tensorboard.summary", {"tensorboard": True}, "tensorboard"),
    ],
)
def test_missing_tracker_names_the_pip_command(tmp_path, monkeypatch, module, options, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"logging.{package} .*pip install {package}"):
        Trackers(tmp_path, **options)


def test_no_tracker_does_nothing(tmp_path):
    with Trackers(tmp_path) as trackers:
        trackers.log({"iteration": 1, "loss": 1.0})
        trackers.samples(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_grid_places_pictures_in_rows(run_factory):
    run_dir = run_factory(iterations=1, sets=(0,))
    files = sorted((run_dir / "samples/000000").glob("*.png"))[:5]
    assert image_grid(files, columns=3).size == (3 * 98, 2 * 34)
