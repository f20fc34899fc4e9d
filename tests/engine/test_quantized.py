"""A frozen base in 8 or 4 bits: what it computes, that training, rollouts, the reference and
evaluations have the same one, and that what is trained on it serves the whole model."""

import json
import shutil
import sys

import pytest
import torch
from diffusers import FluxPipeline
from dryrun_cases import items
from engine_cases import MODEL, ROOT, examples
from kernel_cases import assert_close
from run_cases import ADAMW, script_here, timeless, train
from test_elastic import same
from test_shared_base import LORA, Trained, assert_one_base, config_of

from tempflow.config import load_config
from tempflow.errors import UserError
from tempflow.estimate import estimate
from tempflow.estimate.fitting import changed, options
from tempflow.models import load_policy
from tempflow.models.adapted import adapted
from tempflow.models.layers import token_layers
from tempflow.models.opened import open_model
from tempflow.models.quantized import BLOCK, KINDS, QuantizedLinear, check_library
from tempflow.training.precision import shares_base

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.cpu  # a runtime in this process, compared to the last bit


# ---------------------------------------------------------------------------------------- the layer
NF4 = (  # QLoRA (arXiv 2305.14314), appendix E
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    + [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    + [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    + [0.7229568362236023, 1.0]
)
LEVELS = {"4bit": NF4, "8bit": [n / 127 for n in range(-127, 128)]}


def rounded(values: torch.Tensor, like: torch.Tensor, kind: str) -> torch.Tensor:
    """Values [out, in] at the nearest of a kind's levels, times the largest magnitude in `like` of
    each block of 64; float64."""

    def blocks(tensor):
        flat = tensor.double().flatten()
        return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)

    levels = torch.tensor(LEVELS[kind], dtype=torch.float64)
    largest = blocks(like).abs().amax(1, keepdim=True)
    chosen = (blocks(values) / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[chosen] * largest).flatten()[: values.numel()].view(values.shape)


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", [(64, 96), (18, 7)])
def test_a_layer_multiplies_by_the_rounded_weight(kind, dtype, rel, sides):
    """Weight, forward and gradient, against the definition of each kind; with and without
    gradients the same bits. The library rounds values near the middle of two levels either way."""
    source = torch.nn.Linear(*sides, dtype=dtype)
    layer, x = QuantizedLinear(source, kind, "cpu"), torch.randn(2, 5, sides[0]).to(dtype)
    weight, exact = source.weight.detach(), layer.unpacked(torch.float32)
    want = rounded(exact, weight, kind)
    assert_close("levels", exact, want, 1e-6)
    best = (rounded(weight, weight, kind) - weight).norm()
    assert (want - weight).norm() <= 1.01 * best
    with torch.no_grad():
        inferred = layer(x)
    trained = layer(x.requires_grad_())
    assert torch.equal(trained, inferred)
    assert_close("forward", inferred, x.detach().double() @ want.T + source.bias.double(), rel)
    gradient = torch.randn_like(trained)
    trained.backward(gradient)
    assert_close("gradient", x.grad, gradient.double() @ want, 2 * rel)
    bits = 8 * (layer.weight.nbytes + layer.scales.nbytes) / weight.numel()
    assert bits == pytest.approx(int(kind[0]) + 32 / BLOCK, rel=1e-9 if sides[0] == 64 else 0.1)
    assert layer.state_dict().keys() == {"bias"}, "checkpoints hold no packed weights"
    layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer.unpacked(torch.float32), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_beside_a_packed_weight(kind):
    base = QuantizedLinear(torch.nn.Linear(32, 48), kind, "cpu")
    layer, x = adapted(base, rank=3, scale=1.7), torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(layer(x), base(x)), "the adapter begins as none"
        layer.down.normal_(), layer.up.normal_()
        weight = base.unpacked(torch.float32).double()
        weight += 1.7 * layer.up.double() @ layer.down.double()
        assert_close("forward", layer(x), x.double() @ weight.T + base.bias.double(), 1e-6)
    assert layer.weight is base.weight and layer.scales is base.scales


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer(kind):
    """`rollout.compile` and `training.compile`: without a break of the graph, the same values and
    gradients."""
    base = QuantizedLinear(torch.nn.Linear(32, 48), kind, "cpu")
    layer, x = adapted(base, rank=3, scale=1.7), torch.randn(2, 5, 32)
    with torch.no_grad():
        layer.down.normal_(), layer.up.normal_()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
    found = []
    for trained in (base, torch.compile(base, backend="aot_eager", fullgraph=True)):
        given = x.clone().requires_grad_()
        out = trained(given)
        out.square().sum().backward()
        found.append((out, given.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ----------------------------------------------------------------------------------------- one base
def addresses(module) -> list[int]:
    return [t.data_ptr() for t in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("kind, stage, dtype", [("4bit", 1, "bfloat16"), ("8bit", 0, "float32")])
def test_training_rollouts_and_reference_have_one_base(kind, stage, dtype):
    """Every layer that sees tokens is packed; what the runtime computes is what a model of unpacked
    weights does, and the dry run counts its bytes."""
    config = config_of(stage, dtype, training={"penalty": {"coef": 0.1}}, model={"quantize": kind})
    trained = Trained(config)
    assert_one_base(trained)
    packed = {n for n, m in trained.copy.named_modules() if isinstance(m, QuantizedLinear)}
    plain = load_policy(str(MODEL), dtype=dtype, max_sequence_length=20).denoiser()
    assert packed == token_layers(plain).keys() and len(packed) > 10
    with torch.no_grad():
        unrounded = trained.velocity(plain)
        for name in packed:
            layer = trained.copy.get_submodule(name)
            plain.get_submodule(name).weight.copy_(layer.unpacked(layer.dtype))
        base = trained.velocity(plain)
        assert torch.equal(trained.velocity(trained.copy), base)
        assert 1e-4 < (base - unrounded).norm() / unrounded.norm() < 0.2
        before = addresses(trained.copy)
        trained.update()
        trained.runtime.refresh(trained.copy)
        assert addresses(trained.copy) == before, "captured graphs stay valid"
        engine, rollout = trained.velocity(trained.runtime.engine), trained.velocity(trained.copy)
        with trained.runtime.reference_transformer() as of_reference:
            assert torch.equal(trained.velocity(of_reference), base)
        rel = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
        assert_close("rollout and training", rollout, engine, rel)
        assert (engine - base).float().norm() > 1e-2 * base.float().norm(), "the adapters matter"
    assert_one_base(trained)
    counted = items(estimate(config))
    held = sum(
        t.nbytes for t in (*trained.runtime.module.parameters(), *trained.runtime.module.buffers())
    )
    assert counted["parameters"] == held


# ------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lora": None}, "needs model.lora; quantized weights cannot be trained"),
        ({"stage": 3}, "needs ZeRO stage 0, 1 or 2"),
        ({"share_base": False}, "excludes model.share_base false"),
        (
            {"rollout": {"suffix": {"weights": "float8"}}},
            'excludes rollout.suffix.weights "float8"',
        ),
    ],
)
def test_what_a_packed_base_does_not_go_with(changes, words):
    with pytest.raises(UserError, match=f'model.quantize: "4bit" {words}'):
        config_of(model={"quantize": "4bit"}, **changes)


def test_two_dtypes_are_refused():
    config = config_of(model={"quantize": "4bit", "dtype": "bfloat16"})
    with pytest.raises(UserError, match="model.quantize needs one dtype for rollouts and training"):
        shares_base(config, "cpu")
    without_copy = config_of(
        model={"quantize": "4bit", "dtype": "bfloat16"}, rollout={"replica": False}
    )
    assert not shares_base(without_copy, "cpu")


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_library(None)
    with pytest.raises(UserError, match="model.quantize: needs the package bitsandbytes.*pip in"):
        check_library("8bit")
    with pytest.raises(
        UserError, match="model.quantize"
    ):  # of evaluations, before a model is loaded
        open_model(config_of(model={"quantize": "8bit"}), examples(["one"]), "cpu")


# ------------------------------------------------------------------------------------- runs
RUN = {
    "model": {"lora": LORA, "quantize": "4bit"},
    "rollout": {"num_steps": 3, "plan": {"branch_steps": [0, 1], "seeds": 1}, "lanes": 1},
    "training": {
        "iterations": 2,
        "penalty": {"coef": 0.05},
        "ema": {"decay": 0.5, "every": 1},
    },
    "eval": {"every": 2, "prompts": 2},
    "checkpoint": {"every": 1, "keep": 2},
    "deepspeed": {
        "optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-2}},
        "zero_optimization": {"stage": 2},
    },
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("packed"), "whole", processes=None, **RUN)


@pytest.mark.slow
def test_a_run_on_a_packed_base(whole, tmp_path):
    """It trains, and goes on from a checkpoint to the same bits."""
    assert all(row["grad_norm"] > 0 for row in whole.rows[1:]) and whole.checkpoints == [1, 2]
    assert max(row["mismatch/log_prob"] for row in whole.rows[1:]) < 1e-6
    files = [f.stat().st_size for f in (whole.folder / "checkpoints/000002").rglob("*")]
    assert max(files) < (MODEL / "transformer/diffusion_pytorch_model.safetensors").stat().st_size

    shutil.copytree(whole.folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/000002")
    again = train(tmp_path, "again", "--resume", processes=None, **RUN)
    assert [timeless(row) for row in again.rows] == [timeless(row) for row in whole.rows]
    for which in ("weights", "ema"):
        assert same(again.weights(name=which), whole.weights(name=which))
    assert not same(whole.weights(name="ema"), whole.weights())


@pytest.mark.slow
def test_two_ranks_run_as_one(whole, tmp_path):
    """Rewards to some levels of pixels, the rest to rounding."""
    two = train(tmp_path, "two", processes=2, **RUN)
    for a, b in zip(whole.rows, two.rows, strict=True):
        assert a.keys() == b.keys()
        for key in (k for k in a if k.startswith(("reward/m", "eval/r"))):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
        for key in (k for k in a if k in ("grad_norm", "kl")):
            assert b[key] == pytest.approx(a[key], rel=3e-4), key
    for which in ("weights", "ema"):
        mine, theirs = whole.weights(name=which), two.weights(name=which)
        assert_close(
            which,
            torch.cat([theirs[name].flatten() for name in mine]),
            torch.cat([mine[name].flatten() for name in mine]),
            3e-4,
        )


@pytest.mark.slow
def test_an_evaluation_of_its_own_finds_the_same_rewards(whole):
    scored = script_here("evaluate", "--run", whole.folder, "--compare")
    assert scored.returncode == 0, scored.stderr
    result, (before, *_, after) = json.loads(scored.stdout), whole.rows
    assert result["base_reward"] == pytest.approx(before["eval/reward"], rel=1e-4)
    assert result["reward"] == pytest.approx(after["eval/reward"], rel=1e-4)


@pytest.mark.slow
def test_what_it_exports_is_of_the_whole_model(whole, tmp_path):
    """The adapters alone, and merged into weights that were never packed; both in plain
    diffusers."""
    trained, loaded = whole.weights(name="ema"), {}
    for more in ([], ["--merge"]):
        out = tmp_path / ("merged" if more else "lora")
        done = script_here("export", "--run", whole.folder, "--out", out, *more)
        assert done.returncode == 0, done.stderr
    pipe = FluxPipeline.from_pretrained(MODEL)
    base = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    pipe.load_lora_weights(tmp_path / "lora")
    loaded = dict(pipe.transformer.named_parameters())
    for name, value in trained.items():
        assert torch.equal(loaded[name.replace(".default.", ".default_0.")], value), name
    merged = FluxPipeline.from_pretrained(tmp_path / "merged").transformer.state_dict()
    for name in (n for n in trained if ".lora_A." in n):
        layer, up = name.split(".lora_A.")[0], trained[name.replace("lora_A", "lora_B")]
        want = base[f"{layer}.weight"].double() + 3 * up.double() @ trained[name].double()
        assert_close(layer, merged[f"{layer}.weight"], want, 1e-6)
    assert torch.equal(merged["x_embedder.weight"], base["x_embedder.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, words",
    [
        (("sample", "--run", "RUN", "--out", "OUT", "--count", 1), "1 pair in"),
        (("refine", "--run", "RUN", "--out", "OUT", "--count", 1, "--rounds", 1), ""),
        (("merge", "RUN", "RUN", "--out", "OUT"), "LoRA weights of rank 8"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_else_is_made_of_it(whole, tmp_path, command, words):
    name, *arguments = command
    places = {"RUN": whole.folder, "OUT": tmp_path / "out"}
    done = script_here(name, *(places.get(one, one) for one in arguments))
    assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    assert any((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("other", [None, "8bit"])
def test_a_run_goes_on_with_the_base_it_began_with(whole, tmp_path, other):
    shutil.copytree(whole.folder, tmp_path / "other")
    changes = {**RUN, "model": {**RUN["model"], "quantize": other}}
    done = train(tmp_path, "other", "--resume", processes=None, status=2, **changes).done
    assert "--resume: model.quantize is" in done.stderr and "has '4bit'" in done.stderr


# ------------------------------------------------------------------------------------- bytes
def test_flux_lora_fits_24_gb():
    """At 512 pixels, in at most 22 GB; not without `quantize`."""
    file = ROOT / "configs/flux_lora_24gb.json"
    config = load_config(file)
    assert (config.rollout.height, config.rollout.width) == (512, 512)
    found = estimate(config, card_gb=22)
    assert found.fits and found.total < 22e9
    assert not estimate(load_config(file, ["model.quantize=null"]), card_gb=24).fits


def test_the_dry_run_proposes_it():
    """8 bits where they are enough, else 4; for adapters alone."""
    option = next(o for o in options(1) if "the frozen base is rounded" in o.cost)
    config = config_of()
    for kind in ("8bit", "4bit"):
        assert option.changes(config, estimate(config)) == {"model.quantize": kind}
        less = changed(config, {"model.quantize": kind})
        before, after = estimate(config), estimate(less)
        assert after.total < before.total and after.parameters == before.parameters
        config = less
    assert option.changes(config, estimate(config)) is None
    assert option.changes(config_of(lora=None), estimate(config)) is None
