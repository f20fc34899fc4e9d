"""An average that was never taken holds the weights before training: it is not written, loaded,
exported or evaluated."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from engine_cases import small_config
from run_cases import train
from safetensors.torch import save_file

from tempflow.checkpoints import find, load, manifest
from tempflow.errors import UserError, counted
from tempflow.training.ema import Average


def saved_by_hand(folder, updates, every, file):
    """A run directory with one checkpoint, as this version and older ones write them; raw weights
    are 1, the average is 0."""
    config = small_config(training={"ema": every and {"decay": 0.9, "every": every}})
    (folder / "config.json").write_text(config.model_dump_json())
    draft = find.folder(folder, 5)
    draft.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, draft / "weights.safetensors")
    if file:
        save_file({"w": torch.zeros(2)}, draft / "ema.safetensors")
    (draft / "state.json").write_text(json.dumps({"iteration": 5, "ema_updates": updates}))
    manifest.seal(draft)


@pytest.mark.parametrize(
    "updates, every, file, which",
    [
        (3, 8, True, "raw"),  # of an older version, which wrote it all the same
        (7, 8, True, "raw"),
        (3, 8, False, "raw"),
        (0, 1, True, "raw"),
        (8, 8, True, "ema"),
        (9, 8, True, "ema"),
        (1, 1, True, "ema"),
        (0, None, False, "raw"),
    ],
)
def test_which_weights_are_read(tmp_path, capsys, updates, every, file, which):
    saved_by_hand(tmp_path, updates, every, file)
    found = load.load_tuned(tmp_path)
    assert found.which == which and found.weights["w"].tolist() == (
        [0, 0] if which == "ema" else [1, 1]
    )
    out, err = capsys.readouterr()
    told = (
        f"no average was taken until iteration 5, in {counted(updates, 'update')}"
        f" (training.ema.every: {every}); the raw weights are used"
    )
    assert out == "" and (told in err) == (every is not None and which == "raw")
    assert (
        load.load_tuned(tmp_path, which="raw").which == "raw" and capsys.readouterr().err == ""
    ), "which was asked for"


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_a_checkpoint_that_a_training_run_removes_meanwhile(tmp_path, monkeypatch, which):
    saved_by_hand(tmp_path, 9, 8, True)
    newest = find.newest(tmp_path)
    shutil.rmtree(newest)
    monkeypatch.setattr(load.find, "newest", lambda run_dir, note: newest)
    with pytest.raises(UserError, match="000005 cannot be read any more .*: try again"):
        load.load_tuned(tmp_path, which=which)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_diverged_are_refused(tmp_path, value):
    saved_by_hand(tmp_path, 9, 8, True)
    folder = find.folder(tmp_path, 5)
    for name in ("weights", "ema"):
        save_file(
            {"v": torch.ones(2), "w": torch.tensor([0.0, value])}, folder / f"{name}.safetensors"
        )
    (folder / manifest.MANIFEST).unlink()
    manifest.seal(folder)
    for which in ("raw", "ema"):
        with pytest.raises(UserError, match="1 of 2 tensors hold NaN or infinity, w first"):
            load.load_tuned(tmp_path, which=which)


@pytest.mark.parametrize("lora", [False, True])
def test_weights_too_large_for_a_dtype_are_refused(lora):
    """Not written as infinity. Beyond float16 is 1e5; of the adapters it is their product."""
    layer = torch.nn.ModuleDict({"w": torch.nn.Linear(2, 2, bias=False)})
    names = {
        "w" + load.LORA_DOWN: torch.full((1, 2), 1e3),
        "w" + load.LORA_UP: torch.full((2, 1), 1e2),
    }
    config = small_config(model={"lora": {"rank": 1, "alpha": 1.0} if lora else None})
    large = load.Tuned(config, 1, "raw", names if lora else {"w.weight": torch.full((2, 2), 1e5)})
    with pytest.raises(UserError, match="w.* holds values too large for float16"):
        load.apply(large, SimpleNamespace(denoiser=layer.half))
    load.apply(large, SimpleNamespace(denoiser=layer.bfloat16))
    assert layer["w"].weight.isfinite().all() and (layer["w"].weight > 9e4).all()


def average_of(weights, every=3):
    runtime = SimpleNamespace(
        trainable=weights,
        trainable_shapes=lambda: {n: tuple(t.shape) for n, t in weights.items()},
        full_fp32=lambda t: t.float(),
        policy=SimpleNamespace(device="cpu"),
    )
    return Average(runtime, 0.5, every)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_run_resumed_before_the_first_average_takes_the_same_one(tmp_path, cut):
    """It begins with the weights before training, which a resumed run has anew."""
    steps = [torch.full((2,), float(n)) for n in range(1, 5)]
    weights, resumed = {"w": torch.zeros(2)}, {"w": torch.zeros(2)}
    whole, again = average_of(weights), average_of(resumed)
    again.read(tmp_path / "absent.safetensors", cut)
    for n, step in enumerate(steps):
        weights["w"].copy_(step)
        whole.update()
        if n >= cut:
            resumed["w"].copy_(step)
            again.update()
        assert whole.taken == (n >= 2)
    assert again.taken and again.updates == whole.updates == 4
    assert torch.equal(whole.gather(["w"])["w"], again.gather(["w"])["w"])


def test_an_average_that_was_taken_must_be_there(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text(
        json.dumps({"iteration": 5, "ema_updates": 3, "world_size": 1})
    )
    monkeypatch.setattr(load.universal, "load_state", lambda engine, folder: True)
    runtime = SimpleNamespace(stage=0, engine=None)
    with pytest.raises(UserError, match="holds no average"):
        load.restore(runtime, average_of({"w": torch.zeros(2)}, every=3), tmp_path)
    assert (
        load.restore(runtime, average_of({"w": torch.zeros(2)}, every=4), tmp_path)["ema_updates"]
        == 3
    )


@pytest.mark.slow
def test_a_run_without_an_average_is_taken_for_what_it_trained(tmp_path):
    run = train(
        tmp_path,
        "never",
        processes=None,
        model={"lora": {"rank": 4, "alpha": 8.0}},
        rollout={"num_steps": 3, "plan": {"branch_steps": [0, 1]}},
        training={"iterations": 1, "ema": {"every": 8}},
        eval={"every": 1, "prompts": 2},
    )
    assert "no average was taken in 1 update (" in run.done.stdout
    assert json.loads((run.folder / "samples/000001/samples.json").read_text())["weights"] == "raw"
    assert not (run.folder / "checkpoints/000001/ema.safetensors").exists()
    found = load.load_tuned(run.folder)
    assert found.which == "raw" and all(
        t.abs().max() > 0 for name, t in found.weights.items() if "lora_B" in name
    )
