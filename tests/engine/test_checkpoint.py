"""Checkpoints: nothing half-written is ever taken for whole, whatever befalls it."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tempflow.checkpoints import find, load, manifest, save
from tempflow.errors import RankError, UserError

FILES = {
    "weights.safetensors": b"w" * 1000,
    "state.json": b'{"iteration": 3}',
    "deepspeed/state/rank_0.pt": b"d" * 500,
}


def make(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.seal(folder)
    return folder


def checkpoints(run_dir, *iterations):
    return [make(find.folder(run_dir, n)) for n in iterations]


# ----------------------------------------------------------------------------------------- manifest
def test_a_sealed_checkpoint_is_whole(tmp_path):
    assert manifest.problem_with(make(tmp_path / "000003")) is None


@pytest.mark.parametrize("name", FILES)
def test_faults_are_named(tmp_path, name):
    folder = make(tmp_path / "000003")
    whole = (folder / name).read_bytes()
    for content, words in (
        (whole[:-1], [f"{len(whole) - 1} bytes, not {len(whole)}"]),
        (whole + b"x", [f"{len(whole) + 1} bytes, not {len(whole)}"]),
        (b"", ["0 bytes"]),
        (bytes([whole[0] ^ 1]) + whole[1:], ["does not match its checksum"]),
        (None, ["is missing"]),
    ):
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        trouble = manifest.problem_with(folder)
        assert all(word in trouble for word in [str(folder / name), *words]), trouble
        (folder / name).write_bytes(whole)
    assert manifest.problem_with(folder) is None


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"state.json": {}}', b'{"state.json": 3}'],
)
def test_a_damaged_manifest_is_a_fault(tmp_path, content):
    folder = make(tmp_path / "000003")
    (
        (folder / manifest.MANIFEST).unlink()
        if content is None
        else (folder / manifest.MANIFEST).write_bytes(content)
    )
    assert "manifest.json is missing or damaged" in manifest.problem_with(folder)


def test_an_empty_manifest_is_no_checkpoint(tmp_path):
    """Not even of an empty folder: what a crash leaves must not pass for a checkpoint of
    nothing."""
    folder = tmp_path / "000003"
    folder.mkdir()
    (folder / manifest.MANIFEST).write_text("{}")
    assert manifest.problem_with(folder)


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path, monkeypatch):
    folder = make(tmp_path / "000003")

    def fail(file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "_digest", fail)
    assert "000003 cannot be read: [Errno 5] Input/output error" in manifest.problem_with(folder)


@given(st.data())
def test_any_flipped_byte_is_found(tmp_path_factory, data):
    folder = make(tmp_path_factory.mktemp("flip") / "000003")
    name = data.draw(st.sampled_from([*FILES, manifest.MANIFEST]))
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    same = name == manifest.MANIFEST and equal_json(content, make(folder.parent / "again") / name)
    assert (manifest.problem_with(folder) is None) == same


def equal_json(content, file):
    """Whether a manifest still says the same: white space may become other white space."""
    with contextlib.suppress(ValueError):
        return json.loads(bytes(content)) == json.loads(file.read_text())
    return False


# ------------------------------------------------------------------------------------------- newest
def test_newest(tmp_path):
    assert find.newest(tmp_path) is None
    checkpoints(tmp_path, 2, 40, 9)
    assert find.newest(tmp_path).name == "000040"
    assert [p.name for p in find.folders(tmp_path)] == ["000002", "000009", "000040"]


def test_newest_passes_over_broken_ones_and_names_them(tmp_path):
    _, second, third, fourth = checkpoints(tmp_path, 1, 2, 3, 4)
    (fourth / manifest.MANIFEST).unlink()
    (third / "weights.safetensors").write_bytes(b"w" * 999)
    notes = []
    assert find.newest(tmp_path, notes.append) == second
    assert len(notes) == 2
    assert "000004" in notes[0] and "manifest.json is missing" in notes[0]
    assert "000003" in notes[1] and "999 bytes, not 1000" in notes[1]


def test_leftovers_of_a_crash_are_no_checkpoints(tmp_path):
    (first,) = checkpoints(tmp_path, 1)
    make(tmp_path / "checkpoints/.saving-000002")
    make(tmp_path / "checkpoints/notes")
    (tmp_path / "checkpoints/000009").write_text("a file")
    notes = []
    assert find.newest(tmp_path, notes.append) == first and notes == []


def test_all_broken_is_none(tmp_path):
    for folder in checkpoints(tmp_path, 1, 2):
        (folder / "state.json").unlink()
    assert find.newest(tmp_path) is None


# --------------------------------------------------------------------------------------------- save
class Engine:
    """DeepSpeed's part of a checkpoint: one file; or, with `broken`, half of it and an
    exception."""

    def __init__(self):
        self.broken, self.module = False, torch.nn.Linear(1, 1)

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        assert save_latest is False and exclude_frozen_parameters is True
        place = Path(folder) / tag
        place.mkdir(parents=True)
        (place / "state.pt").write_bytes(b"half")
        if self.broken:
            raise OSError("no space left on device")
        (place / "state.pt").write_bytes(b"the whole state")

    def load_checkpoint(self, folder, tag, load_module_strict):
        assert load_module_strict is True
        return f"{folder}/{tag}", {}


class Average:
    key, every, taken = "ema", 1, True

    def __init__(self):
        self.loaded = None

    def write(self, file):
        save_file({"layer.weight": torch.full((2, 3), 0.5)}, file)

    def read(self, file, updates):
        self.loaded = load_file(file)["layer.weight"], updates


@pytest.fixture
def runtime():
    weight = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    return SimpleNamespace(
        engine=Engine(),
        trainable={"layer.weight": weight},
        full_fp32=lambda p: p.float().t().t(),
        stage=0,
        trainable_shapes=lambda: {"layer.weight": (2, 3)},
    )


def state_of(iteration, **more):
    return {"iteration": iteration, "world_size": 1, "ema_updates": 4, **more}


def test_save_writes_what_restore_reads(runtime, tmp_path):
    saved = save.save_checkpoint(runtime, Average(), tmp_path, state_of(7), keep=2)
    assert saved == tmp_path / "checkpoints/000007" == find.newest(tmp_path)
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "000007"
    weights = load_file(saved / "weights.safetensors")["layer.weight"]
    assert weights.dtype == torch.float32 and torch.equal(weights, torch.arange(6.0).reshape(2, 3))
    average = Average()
    assert load.restore(runtime, average, saved) == state_of(7)
    assert average.loaded[1] == 4 and (average.loaded[0] == 0.5).all()


def test_save_keeps_the_newest(runtime, tmp_path):
    for iteration in (1, 2, 3, 10, 12):
        save.save_checkpoint(runtime, None, tmp_path, state_of(iteration), keep=2)
    assert [p.name for p in find.folders(tmp_path)] == ["000010", "000012"]
    assert all(manifest.problem_with(p) is None for p in find.folders(tmp_path))


# the held-out reward, another metric
EVALUATED = {1: (0.5, 5.0), 2: (0.4, 7.0), 10: (0.7, 6.0), 12: (0.6, None), 14: (0.6, 7.0)}


@pytest.mark.parametrize(
    "metric, expected",
    [
        ("eval/reward", [[1], [1, 2], [1, 3], [10], [10, 12], [10, 14]]),
        ("diversity/seeds", [[1], [2], [2, 3], [2, 10], [2, 12], [2, 14]]),
    ],
)
def test_save_keeps_the_best(runtime, tmp_path, metric, expected):
    """Of those evaluated, which iteration 3 is not, though a rollout has told its diversity; the
    first of equals."""
    kept = []
    for iteration in (1, 2, 3, 10, 12, 14):
        reward, diversity = EVALUATED.get(iteration, (None, 9.0))
        row = {"iteration": iteration, "diversity/seeds": diversity} | (
            {"eval/reward": reward} if reward else {}
        )
        with open(tmp_path / "metrics.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        save.save_checkpoint(runtime, None, tmp_path, state_of(iteration), keep=1, best_by=metric)
        kept.append([int(p.name) for p in find.folders(tmp_path)])
    assert kept == expected
    assert int(find.best(tmp_path, metric).name) == expected[-1][0]


def test_an_evaluation_with_broken_images_is_never_the_best(runtime, tmp_path):
    """Its mean is over the prompts at which the weights did not fail."""
    rows = [{"iteration": n, "eval/reward": reward} for n, reward in ((1, 0.5), (2, 0.9), (3, 0.4))]
    rows[1]["eval/not_finite"] = 3
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for iteration in (1, 2, 3):
        save.save_checkpoint(runtime, None, tmp_path, state_of(iteration), keep=9)
    assert int(find.best(tmp_path, "eval/reward").name) == 1


def test_without_evaluations_there_is_no_best(runtime, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    for iteration in (1, 2):
        save.save_checkpoint(
            runtime, None, tmp_path, state_of(iteration), keep=1, best_by="eval/reward"
        )
    assert find.best(tmp_path, "eval/reward") is None and len(find.folders(tmp_path)) == 1


def test_save_again_replaces(runtime, tmp_path):
    save.save_checkpoint(runtime, Average(), tmp_path, state_of(3), keep=2)
    saved = save.save_checkpoint(runtime, None, tmp_path, state_of(3, images=5), keep=2)
    assert load.read_state(saved)["images"] == 5 and not (saved / "ema.safetensors").exists()
    assert manifest.problem_with(saved) is None


def test_a_save_that_fails_leaves_the_last_one(runtime, tmp_path):
    first = save.save_checkpoint(runtime, None, tmp_path, state_of(1), keep=1)
    runtime.engine.broken = True
    with pytest.raises(OSError):
        save.save_checkpoint(runtime, None, tmp_path, state_of(2), keep=1)
    assert find.folders(tmp_path) == [first] and find.newest(tmp_path) == first
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "000001"
    runtime.engine.broken = False
    (tmp_path / "checkpoints/.universal-000001/state").mkdir(parents=True)
    next_one = save.save_checkpoint(runtime, None, tmp_path, state_of(3), keep=1)
    assert find.newest(tmp_path) == next_one != first
    assert not list((tmp_path / "checkpoints").glob(".*")), (
        "what the broken one left is gone, though it had another number"
    )


@pytest.mark.parametrize(
    "error, free",
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1 << 40),
        (RuntimeError("PytorchStreamWriter failed writing file"), 0),
    ],
)
def test_a_full_disk_is_named_and_cleared(runtime, tmp_path, monkeypatch, error, free):
    first = save.save_checkpoint(runtime, None, tmp_path, state_of(1), keep=2)

    def full(*args):
        raise error

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("tempflow.checkpoints.save.write_together", full)
    monkeypatch.setattr(
        "tempflow.checkpoints.save.shutil.disk_usage", lambda path: usage._replace(free=free)
    )
    with pytest.raises(
        RankError, match="no space left .* MB were written.*--resume from 000001, which is whole"
    ):
        save.save_checkpoint(runtime, None, tmp_path, state_of(2), keep=2)
    assert find.newest(tmp_path) == first and not list((tmp_path / "checkpoints").glob(".*"))
    monkeypatch.setattr(
        "tempflow.checkpoints.save.shutil.disk_usage", lambda path: usage._replace(free=1 << 40)
    )
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        save.save_checkpoint(runtime, None, tmp_path, state_of(2), keep=2)


def test_a_disk_too_full_for_a_folder(runtime, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("tempflow.checkpoints.save.Path.mkdir", mock.Mock(side_effect=full))
    with pytest.raises(RankError, match="no space left for a checkpoint, of which 0.0 MB"):
        save.save_checkpoint(runtime, None, tmp_path, state_of(2), keep=2)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_cannot_be_written_is_named(runtime, tmp_path, monkeypatch, code):
    first = save.save_checkpoint(runtime, None, tmp_path, state_of(1), keep=2)
    monkeypatch.setattr(
        "tempflow.checkpoints.save.write_together",
        mock.Mock(side_effect=OSError(code, os.strerror(code))),
    )
    with pytest.raises(
        RankError,
        match=(
            f"checkpoints: a checkpoint cannot be written .*{os.strerror(code)}.*--resume from"
            " 000001"
        ),
    ):
        save.save_checkpoint(runtime, None, tmp_path, state_of(2), keep=2)
    assert find.newest(tmp_path) == first and not list((tmp_path / "checkpoints").glob(".*"))


def test_an_old_one_that_stays_ends_nothing(runtime, tmp_path, monkeypatch):
    """As on NFS while another process has one of its files open: the next save removes it."""
    save.save_checkpoint(runtime, None, tmp_path, state_of(1), keep=1)
    with monkeypatch.context() as busy:
        busy.setattr(
            os, "rmdir", mock.Mock(side_effect=OSError(errno.EBUSY, os.strerror(errno.EBUSY)))
        )
        second = save.save_checkpoint(runtime, None, tmp_path, state_of(2), keep=1)
    assert find.newest(tmp_path) == second and len(find.folders(tmp_path)) == 2
    third = save.save_checkpoint(runtime, None, tmp_path, state_of(3), keep=1)
    assert find.folders(tmp_path) == [third]


@pytest.mark.parametrize("crash_at", ["manifest.seal", "os.rename", "write_together"])
def test_a_crash_at_any_point_of_saving(runtime, tmp_path, monkeypatch, crash_at):
    first = save.save_checkpoint(runtime, None, tmp_path, state_of(1), keep=2)

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"tempflow.checkpoints.save.{crash_at}", crash)
    with pytest.raises(KeyboardInterrupt):
        save.save_checkpoint(runtime, None, tmp_path, state_of(2), keep=2)
    assert find.newest(tmp_path) == first


def test_without_zero_any_number_of_ranks_is_taken_up(runtime, tmp_path):
    saved, notes = (
        save.save_checkpoint(runtime, None, tmp_path, state_of(1, world_size=4), keep=1),
        [],
    )
    load.restore(runtime, None, saved, notes.append)
    assert notes == ["checkpoint 000001 was written by 4 ranks and is resumed on 1"]


def test_restore_refuses_a_checkpoint_without_the_average(runtime, tmp_path):
    saved = save.save_checkpoint(runtime, None, tmp_path, state_of(1), keep=1)
    with pytest.raises(UserError, match="training.ema"):
        load.restore(runtime, Average(), saved)
