"""A merge of snapshots stands for a decay of the updates; it is saved, resumed and read as an
average is."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_cases import config_table, small_config
from run_cases import timeless, train
from safetensors.torch import load_file

from tempflow.checkpoints import load
from tempflow.config import parse_config
from tempflow.errors import UserError
from tempflow.training.merge import DECAYS, Merge, coefficients


@pytest.mark.parametrize("shape", ["linear", "mean"])
def test_a_linear_decay_is_the_mean(shape):
    assert coefficients(shape, 4) == [0.25, 0.25, 0.25, 0.25]


def test_the_decay_of_a_square_root():
    """w = 1 - sqrt((i - 1) / 4) = (1, 0.5, 0.29289, 0.13397)."""
    assert coefficients("sqrt", 4) == pytest.approx(
        [0.5, 0.5 - (1 - math.sqrt(0.5)), math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    )
    assert coefficients("sqrt", 1) == [1.0]


def merge_of(weights, last=4, every=1, shape="sqrt", scale=1.0):
    runtime = SimpleNamespace(
        trainable=weights,
        trainable_shapes=lambda: {n: tuple(t.shape) for n, t in weights.items()},
        full_fp32=lambda t: t.float(),
        policy=SimpleNamespace(device="cpu"),
    )
    return Merge(runtime, last, every, shape, scale)


@pytest.mark.parametrize("shape", DECAYS)
@pytest.mark.parametrize(
    "last, updates, window", [(4, 4, 4), (4, 9, 4), (8, 3, 3)], ids=["full", "later", "fewer"]
)
def test_it_equals_decayed_updates(shape, last, updates, window):
    """The weights before the window plus its updates, the i-th scaled by w_i."""
    steps = torch.randn(updates, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = {"w": torch.zeros(5, dtype=torch.float64)}
    merge = merge_of(weights, last, 1, shape)
    for step in steps:
        weights["w"] += step
        merge.update()
    decay = torch.tensor([DECAYS[shape](i / window) for i in range(window)], dtype=torch.float64)
    expected = steps[:-window].sum(0) + (decay[:, None] * steps[-window:]).sum(0)
    torch.testing.assert_close(merge.gather(["w"])["w"].double(), expected, rtol=1e-6, atol=1e-6)


def test_snapshots_are_taken_every_few_updates():
    weights = {"w": torch.zeros(1)}
    merge = merge_of(weights, last=2, every=3, shape="mean")
    for n in range(1, 10):
        weights["w"].fill_(float(n))
        merge.update()
        assert merge.taken == (n >= 3)
        if n >= 3:
            assert merge.gather(["w"])["w"].item() == {1: 3.0, 2: 4.5, 3: 7.5}[n // 3]
    assert merge.gather(["unknown"]) == {}


def test_a_scale_goes_on_from_the_base_through_the_mean():
    """1 + 2 (mean(2, 4) - 1) = 5; of an adapter B A the factor B is scaled."""
    weights = {
        name: torch.tensor([value])
        for name, value in (("w", 1.0), ("q.lora_A.default.weight", 3.0), ("q.lora_B.weight", 0.0))
    }
    merge = merge_of(weights, last=2, shape="mean", scale=2.0)
    for value in (2.0, 4.0):
        for weight in weights.values():
            weight.fill_(value)
        merge.update()
    assert {n: t.item() for n, t in merge.gather(weights).items()} == {
        "w": 5.0,
        "q.lora_A.default.weight": 3.0,
        "q.lora_B.weight": 6.0,
    }


@pytest.mark.parametrize("cut, last", [(2, 3), (4, 3), (7, 3), (7, 2), (7, 5)])
def test_a_resumed_merge_goes_on(tmp_path, cut, last):
    """Bit for bit where `last` stays; the newest snapshots are kept where it shrinks, all where it
    grows."""
    values = torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(2))
    weights, resumed = (
        {"a": torch.zeros(3), "b": torch.zeros(3)},
        {"a": torch.zeros(3), "b": torch.zeros(3)},
    )
    whole, again = merge_of(weights, 3, 2), merge_of(resumed, last, 2)
    for n, (a, b) in enumerate(values, start=1):
        weights["a"].copy_(a), weights["b"].copy_(b)
        whole.update()
        if n == cut:
            whole.write(tmp_path / "merge.safetensors")
            again.read(tmp_path / "merge.safetensors", whole.updates)
            assert len(again._snapshots) == min(last, 3, cut // 2)
        if n > cut:
            resumed["a"].copy_(a), resumed["b"].copy_(b)
            again.update()
    assert again.updates == whole.updates and len(again._snapshots) == min(
        last, 3 if last == 3 else 5
    )
    if last == 3:
        assert all(torch.equal(whole.gather([n])[n], again.gather([n])[n]) for n in "ab")
    newest = min(last, 3)
    for mine, theirs in zip(
        list(again._snapshots)[-newest:], list(whole._snapshots)[-newest:], strict=True
    ):
        assert all(torch.equal(mine[n], theirs[n]) for n in "ab")


def test_a_config_has_one_average():
    with pytest.raises(UserError, match="training.merge: excludes training.ema"):
        parse_config(config_table(training={"ema": {}, "merge": {}}))
    assert parse_config(config_table(training={"merge": {}})).training.merge.model_dump() == {
        "last": 8,
        "every": 6,
        "shape": "sqrt",
        "scale": 1.0,
    }
    for change in ({"last": 1}, {"every": 0}, {"shape": "cosine"}, {"scale": 0.5}):
        with pytest.raises(UserError, match=f"training.merge.{next(iter(change))}"):
            small_config(training={"merge": change})


@pytest.mark.slow
def test_a_run_evaluates_saves_and_resumes_its_merge(tmp_path):
    """After each of three updates; that of a run which was cut after the second is the same, bit
    for bit."""

    def start(name, *more):
        return train(
            tmp_path,
            name,
            *more,
            processes=None,
            rollout={"num_steps": 3, "plan": {"branch_steps": [0, 1]}},
            training={
                "iterations": 3,
                "merge": {"last": 2, "every": 1, "shape": "mean", "scale": 1.5},
            },
            eval={"every": 3, "prompts": 2},
            checkpoint={"every": 1, "keep": 9},
        )

    whole = start("whole")
    shutil.copytree(whole.folder, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/000003")
    again = start("cut", "--resume")
    folders = [whole.folder / f"checkpoints/{n:06d}" for n in (2, 3)]
    before, after, merged = (
        load_file(file)
        for file in (
            *(f / "weights.safetensors" for f in folders),
            folders[1] / "merge.safetensors",
        )
    )
    model = Path(json.loads((whole.folder / "config.json").read_text())["model"]["path"])
    base = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    for name, value in merged.items():
        mean, origin = (before[name].double() + after[name].double()) / 2, base[name].double()
        assert torch.equal(value, ((mean - origin) * 1.5 + origin).float())
    assert (
        json.loads((whole.folder / "samples/000003/samples.json").read_text())["weights"] == "merge"
    )
    assert timeless(whole.rows[-1]) == timeless(again.rows[-1])
    assert all(
        torch.equal(merged[name], value) for name, value in again.weights(name="merge").items()
    )

    found = load.load_tuned(whole.folder)
    assert found.which == "merge" and all(
        torch.equal(found.weights[name], merged[name]) for name in merged
    )
    assert load.load_tuned(whole.folder, which="raw").which == "raw"
    with pytest.raises(UserError, match="--weights ema: .* keeps merge; allowed are merge and raw"):
        load.load_tuned(whole.folder, which="ema")
