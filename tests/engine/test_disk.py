"""Disk that checkpoints take, against checkpoints that a real runtime wrote; and what a start says
where they do not fit."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from engine_cases import MODEL, examples, small_config, write_config
from run_cases import ADAMW, script_here

from tempflow.checkpoints import find, manifest, save
from tempflow.errors import UserError
from tempflow.estimate.disk import Disk, check_room, disk
from tempflow.estimate.estimate import disk_of
from tempflow.estimate.item import Item
from tempflow.types import Size

pytestmark = pytest.mark.cpu  # checkpoints of a runtime in this process
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
LORA = {"lora": {"rank": 32, "alpha": 64.0}}
REAL = {  # weights, stage, more of the deepspeed section
    "full-zero0": ({}, 0, {}),
    "full-zero2": ({}, 2, BF16),
    "full-zero3": ({}, 3, BF16),
    "full-zero2-fp32-sgd": (
        {},
        2,
        {
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "zero_allow_untested_optimizer": True,
        },
    ),
    "lora-zero0": (LORA, 0, {}),
    "lora-zero2": (LORA, 2, BF16),
}


@pytest.mark.parametrize("model, stage, section", REAL.values(), ids=REAL)
def test_bytes_of_a_real_checkpoint(tmp_path, model, stage, section):
    """After a step, so that the optimizer has its state. The rest is names, shapes and DeepSpeed's
    scripts, some 100 kB."""
    from tempflow.models import load_policy
    from tempflow.training.distributed import init_distributed
    from tempflow.training.engine import Runtime
    from tempflow.training.session import make_average

    init_distributed()
    config = small_config(
        model=model,
        training=(
            {}
            if "lora" in model
            else (
                {"merge": {"last": 2, "every": 1}}
                if stage == 3
                else {"ema": {"decay": 0.5, "every": 1}}
            )
        ),
        deepspeed={"optimizer": ADAMW, **section, "zero_optimization": {"stage": stage}},
    )
    policy = load_policy(str(MODEL), max_sequence_length=20)
    runtime = Runtime(config, policy)
    average = make_average(config, runtime)
    sampler, conditioning = (
        policy.at(Size(32, 96), 0.0),
        policy.encode(examples(['the word "ABC"'])),
    )
    velocity = sampler.velocity(
        runtime.engine,
        torch.randn(1, *sampler.latent_shape),
        torch.full((1,), 0.5),
        conditioning,
        runtime.dtype,
    )
    runtime.accumulate(velocity.float().square().mean(), last=True)
    assert runtime.step(1.0) is not None
    for _ in range(2 if average else 0):
        average.update()
    saved = save.save_checkpoint(runtime, average, tmp_path, {"iteration": 1}, keep=1)
    written = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    expected = disk_of(config).checkpoint
    assert expected < written < expected * 1.02 + 120_000


@pytest.mark.parametrize(
    "every, iterations, keep, best",
    [
        (2, 20, 2, True),
        (2, 20, 2, False),
        (2, 20, 1, True),
        (10, 20, 2, True),
        (0, 20, 2, True),
        (7, 20, 2, True),
        (7, 20, 9, True),
        (30, 20, 1, True),
    ],
)
def test_checkpoints_at_once(tmp_path, monkeypatch, every, iterations, keep, best):
    """As many as lie there when a run of the trainer's schedule seals one, the first being the best
    all along."""
    table = {
        "checkpoint": {"every": every, "keep": keep, "keep_best": best},
        "training": {"iterations": iterations},
    }
    seen, seal = [], manifest.seal
    monkeypatch.setattr(
        manifest,
        "seal",
        lambda draft: (
            seen.append(len([p for p in draft.parent.iterdir() if p.is_dir()])) or seal(draft)
        ),
    )
    engine = SimpleNamespace(save_checkpoint=lambda *given, **more: None)
    runtime = SimpleNamespace(engine=engine, trainable={}, trainable_shapes=dict)
    for iteration in range(1, iterations + 1):
        with open(tmp_path / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"iteration": iteration, "eval/reward": -iteration}) + "\n")
        if iteration == iterations or every and iteration % every == 0:
            save.save_checkpoint(
                runtime,
                None,
                tmp_path,
                {"iteration": iteration},
                keep,
                "eval/reward" if best else None,
            )
    found = disk(
        small_config(**table), SimpleNamespace(whole_fp32=1, saved_weights=1, saved_optimizer=1)
    )
    assert (found.most, found.kept) == (max(seen), len(find.folders(tmp_path)))


NEEDED = Disk([Item("weights", 3_000_000_000), Item("optimizer", 7_000_000_000)], kept=3, most=4)


def room(tmp_path, monkeypatch, free):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    return check_room(
        small_config(logging={"dir": str(tmp_path / "not/yet/runs"), "name": "run"}), NEEDED
    )


def test_room_for_all(tmp_path, monkeypatch):
    assert room(tmp_path, monkeypatch, 40_000_000_000) is None


def test_room_for_some_is_a_warning(tmp_path, monkeypatch):
    text = room(tmp_path, monkeypatch, 39_000_000_000)
    assert (
        "warning: logging.dir" in text
        and "39.0 GB free" in text
        and "4 checkpoints of 10.0 GB" in text
        and "40.0 GB" in text
    )


def test_room_for_none_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        UserError,
        match=(
            r"logging.dir: .*runs has 9.9 GB free, .* takes 10.0 GB \(weights 3.0 GB, optimizer 7.0"
            r" GB\)"
        ),
    ):
        room(tmp_path, monkeypatch, 9_900_000_000)
    draft = tmp_path / "not/yet/runs/run/checkpoints/.saving-000003"
    draft.mkdir(parents=True)
    with open(draft / "half", "wb") as file:
        file.truncate(200_000_000)  # which the next save removes first
    assert "10.1 GB free" in room(tmp_path, monkeypatch, 9_900_000_000)


def test_a_start_is_refused_before_anything_is_loaded_or_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    monkeypatch.setattr("tempflow.training.assemble.Trainer", None)
    file = write_config(tmp_path, logging={"dir": str(tmp_path / "runs")})
    done = script_here("train", "--config", file)
    assert (
        done.returncode == 2 and "1.0 MB free, and one checkpoint takes 36.8 MB" in done.stderr
    ), done.stderr
    assert not (tmp_path / "runs").exists()
