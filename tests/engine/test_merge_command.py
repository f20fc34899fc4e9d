"""engine/merge.py: the merged model is the one whose weights are the mean, adapters by what they
add, and refusals that say why."""

import copy
import json

import pytest
import torch
from engine_cases import examples, randomise, small_config
from kernel_cases import assert_close
from pipelines_wan import wan_pipeline
from run_cases import script_here
from safetensors.torch import load_file, save_file

from tempflow.checkpoints import find, manifest
from tempflow.config import Lora
from tempflow.models import load_policy
from tempflow.models.lora import merged
from tempflow.run.merging import shares
from tempflow.training.engine import add_lora
from tempflow.types import Size

SIZE = Size(32, 48)


@pytest.fixture(scope="module")
def plain(pipelines):
    return load_policy(pipelines["plain"], max_sequence_length=20)


def velocity(policy, module):
    x = torch.randn(2, *policy.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.velocity(
            module,
            x,
            torch.tensor([0.9, 0.3]),
            policy.encode(examples(["a cat", "two dogs"])),
            SIZE,
            0.0,
        )


def run_of(folder, model, weights, lora=None, iteration=3):
    """A run directory with one checkpoint, as training writes it."""
    config = small_config(model={"path": str(model), "lora": lora})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json())
    draft = find.folder(folder, iteration)
    draft.mkdir(parents=True)
    save_file(
        {name: weight.detach().float().contiguous() for name, weight in weights.items()},
        draft / "weights.safetensors",
    )
    (draft / "state.json").write_text(json.dumps({"iteration": iteration}))
    manifest.seal(draft)
    return folder


def adapters_of(policy, rank, alpha, seed, targets=("to_q", "to_out.0")):
    """Names and values of trained adapters."""
    module = copy.deepcopy(policy.transformer)
    add_lora(
        module, Lora(rank=rank, alpha=alpha, targets=list(targets)), policy.lora_targets, seed=0
    )
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    randomise(torch.nn.ParameterList(trained.values()), seed)
    return {name: p.detach() for name, p in trained.items()}


def with_deltas(policy, adapted):
    """The transformer with part x alpha / rank x B A of each adapter added in full."""
    module = copy.deepcopy(policy.transformer)
    target = dict(module.named_parameters())
    with torch.no_grad():
        for part, scale, weights in adapted:
            for name in (name for name in weights if ".lora_A." in name):
                weight = target[name.split(".lora_A.")[0] + ".weight"]
                weight.copy_(
                    merged(
                        weight,
                        weights[name],
                        weights[name.replace(".lora_A.", ".lora_B.")],
                        part * scale,
                    )
                )
    return module


def command(out, *arguments):
    done = script_here("merge", *arguments, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(out, *arguments):
    done = script_here("merge", *arguments, "--out", out)
    assert done.returncode == 2 and not out.exists(), done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def lora_runs(plain, pipelines, tmp_path_factory):
    """Two LoRA runs of different ranks and scales, and their adapters."""
    folder = tmp_path_factory.mktemp("lora")
    settings = [(2, 4.0), (3, 1.5)]
    held = [adapters_of(plain, rank, alpha, seed) for seed, (rank, alpha) in enumerate(settings)]
    runs = [
        run_of(
            folder / str(n),
            pipelines["plain"],
            weights,
            {"rank": rank, "alpha": alpha, "targets": ["to_q", "to_out.0"]},
        )
        for n, (weights, (rank, alpha)) in enumerate(zip(held, settings))
    ]
    return runs, [(alpha / rank, weights) for weights, (rank, alpha) in zip(held, settings)]


@pytest.mark.parametrize("parts", [None, (0.7, 0.3)], ids=["equal", "weighted"])
def test_merged_adapters_add_the_mean_of_what_each_adds(
    plain, pipelines, lora_runs, tmp_path, parts
):
    """In diffusers, as the velocities of full weights say; averaging the factors would be another
    model."""
    from diffusers import FluxPipeline

    runs, held = lora_runs
    text = command(tmp_path / "out", *runs, *(["--weights", *parts] if parts else []))
    assert "LoRA weights of rank 5" in text
    pipe = FluxPipeline.from_pretrained(pipelines["plain"])
    pipe.load_lora_weights(tmp_path / "out")
    parts = parts or (0.5, 0.5)
    expected = velocity(plain, with_deltas(plain, [(part, *one) for part, one in zip(parts, held)]))
    assert_close("velocity", velocity(plain, pipe.transformer), expected, 1e-5)
    base = velocity(plain, plain.transformer)
    assert (expected - base).norm() > 1e-2 * base.norm(), "the adapters do something"


def test_a_merge_of_merges(plain, pipelines, lora_runs, tmp_path):
    """A LoRA file and a run: a quarter, a quarter, a half."""
    from diffusers import FluxPipeline

    runs, ((s1, w1), (s2, w2)) = lora_runs
    command(tmp_path / "half", *runs)
    text = command(
        tmp_path / "out",
        tmp_path / "half/pytorch_lora_weights.safetensors",
        runs[1] / "checkpoints/000003",
    )
    assert "rank 8" in text
    pipe = FluxPipeline.from_pretrained(pipelines["plain"])
    pipe.load_lora_weights(tmp_path / "out")
    expected = velocity(plain, with_deltas(plain, [(0.25, s1, w1), (0.75, s2, w2)]))
    assert_close("velocity", velocity(plain, pipe.transformer), expected, 1e-5)


@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "whole"])
def test_two_experts(tmp_path, lora):
    """Adapters in a file for each, as diffusers loads them; whole weights in one folder."""
    from diffusers import WanPipeline

    model = wan_pipeline(tmp_path / "wan", experts=True, shift=3.0)
    policy = load_policy(model, max_sequence_length=20)
    base = dict(policy.denoiser().named_parameters())
    settings = {"rank": 2, "alpha": 4.0, "targets": ["attn1.to_v", "ffn.net.2"]} if lora else None
    held = [
        adapters_of(policy, 2, 4.0, seed, settings["targets"])
        if lora
        else {name: p + 0.1 * seed for name, p in base.items()}
        for seed in (1, 2)
    ]
    runs = [run_of(tmp_path / str(n), model, one, settings) for n, one in enumerate(held)]
    command(tmp_path / "out", *runs, "--weights", 0.75, 0.25)
    pipe = WanPipeline.from_pretrained(model if lora else tmp_path / "out")
    if lora:
        pipe.load_lora_weights(tmp_path / "out/transformer")
        pipe.load_lora_weights(tmp_path / "out/transformer_2", load_into_transformer_2=True)
        expected = with_deltas(policy, [(0.75, 2.0, held[0]), (0.25, 2.0, held[1])])
    else:
        expected = copy.deepcopy(policy.denoiser())
        for p in expected.parameters():
            p.data.add_(0.75 * 0.1 + 0.25 * 0.2)
    got = velocity(policy, policy.join_denoiser(pipe.transformer, pipe.transformer_2))
    wanted, before = velocity(policy, expected), velocity(policy, policy.denoiser())
    assert_close("velocity", got, wanted, 1e-5)
    for row in range(2):  # one of each expert
        assert (wanted[row] - before[row]).norm() > 1e-3 * before[row].norm()


def test_whole_models(plain, pipelines, tmp_path):
    """Two runs, and an exported model with the third: each weight is the mean."""
    tuned = [
        {name: p + 0.01 * (n + 1) for name, p in plain.transformer.named_parameters()}
        for n in range(3)
    ]
    a, b, c = (
        run_of(tmp_path / name, pipelines["plain"], weights) for name, weights in zip("abc", tuned)
    )
    text = command(tmp_path / "ab", a, b)
    assert text.startswith("diffusers pipeline: ") and "0.5 x" in text
    command(tmp_path / "abc", tmp_path / "ab", c, "--weights", "0.75", "0.25")
    found = dict(
        load_policy(tmp_path / "abc", max_sequence_length=20).transformer.named_parameters()
    )
    for name, parameter in plain.transformer.named_parameters():
        assert_close(name, found[name], parameter + 0.75 * 0.015 + 0.25 * 0.03, 1e-6)
    assert (
        load_file(next((tmp_path / "abc/transformer").glob("*.safetensors"))).keys() == found.keys()
    )


def test_what_cannot_be_merged_is_refused(plain, pipelines, lora_runs, tmp_path):
    (one, two), out = lora_runs[0], tmp_path / "out"
    whole = {name: p for name, p in plain.transformer.named_parameters()}
    full, other = (
        run_of(tmp_path / "full", pipelines["plain"], whole),
        run_of(tmp_path / "other", pipelines["shifted"], whole),
    )
    fewer = adapters_of(plain, 2, 4.0, 7, targets=("to_q",))
    fewer = run_of(
        tmp_path / "fewer",
        pipelines["plain"],
        fewer,
        {"rank": 2, "alpha": 4.0, "targets": ["to_q"]},
    )
    larger = {
        name: torch.cat([p, p], dim=1) if name.endswith("proj_out.weight") else p
        for name, p in whole.items()
    }
    larger = run_of(tmp_path / "larger", pipelines["plain"], larger)
    (tmp_path / "empty").mkdir()
    assert "is adapters, " in refused(out, one, full) and "--merge" in refused(out, one, full)
    assert "only runs of one base model" in refused(out, full, other)
    assert "lora_A.weight, which " in refused(out, one, fewer)
    assert "they are of different models" in refused(out, full, larger)
    assert "empty is no run directory" in refused(out, one, tmp_path / "empty")
    assert "expected 2 numbers above 0 whose sum is 1, got 0.5 0.6" in refused(
        out, one, two, "--weights", "0.5", "0.6"
    )
    assert "at least two" in refused(out, one)
    assert "inside the run directory" in refused(two / "merged", one, two)
    assert shares(None, 4) == [0.25] * 4


def test_checkpoints_of_one_run(plain, pipelines, tmp_path):
    """The offline twin of training.merge: several checkpoints of a run."""
    weights = dict(plain.transformer.named_parameters())
    run = run_of(tmp_path / "run", pipelines["plain"], weights)
    draft = find.folder(run, 4)
    draft.mkdir()
    save_file({name: p.detach() + 1 for name, p in weights.items()}, draft / "weights.safetensors")
    (draft / "state.json").write_text('{"iteration": 4}')
    manifest.seal(draft)
    command(tmp_path / "out", run / "checkpoints/000003", run / "checkpoints/000004")
    name, found = next(
        iter(load_policy(tmp_path / "out", max_sequence_length=20).transformer.named_parameters())
    )
    assert_close(name, found, weights[name] + 0.5, 1e-6)
