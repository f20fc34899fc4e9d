"""One frozen base: the rollout copy has the training engine's own tensors for all that is not
trained, and adapters of its own."""

import json
import shutil

import diffusers
import pytest
import torch
from dryrun_cases import items
from engine_cases import MODEL, examples, small_config
from family_cases import qwen_pipeline, sd3_pipeline
from kernel_cases import assert_close
from pipelines_wan import wan_pipeline
from run_cases import ADAMW, timeless, train

from tempflow.config import Lora
from tempflow.errors import UserError
from tempflow.estimate import estimate
from tempflow.models import load_policy
from tempflow.models.adapted import AdaptedLinear, whole_weight
from tempflow.models.hub import CARDS
from tempflow.sampling.float8 import Float8Copy
from tempflow.training import distributed
from tempflow.training.ema import Average
from tempflow.training.engine import ADAPTER, Runtime, add_lora
from tempflow.training.precision import shares_base
from tempflow.training.shared_base import adopt, bare_copy
from tempflow.types import Size

pytestmark = pytest.mark.cpu  # a runtime in this process, compared to the last bit
SIZE = Size(32, 96)
LORA = {"rank": 4, "alpha": 12.0}
BF16 = {"bf16": {"enabled": True}}
GUIDED = {"sd3": sd3_pipeline, "qwen_image": qwen_pipeline}


def config_of(stage=0, dtype="float32", lora=LORA, share_base=None, **more):
    half = BF16 if dtype == "bfloat16" else {}
    adamw = {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-2}}
    model = {"dtype": dtype, "lora": lora, "share_base": share_base, **more.pop("model", {})}
    return small_config(
        model=model,
        deepspeed={"optimizer": adamw, **half, "zero_optimization": {"stage": stage}},
        **more,
    )


class Trained:
    """A runtime on a policy, and its velocities of three fixed rows."""

    def __init__(self, config, folder=MODEL, scale=0.0, size=SIZE):
        distributed.init_distributed()
        self.policy = load_policy(str(folder), dtype=config.model.dtype, max_sequence_length=20)
        self.runtime, self.scale, self.size = Runtime(config, self.policy), scale, size
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(3, *self.policy.latent_shape(size), generator=generator)
        self.text = self.policy.encode(examples(["one", "another", "a third"]))

    @property
    def copy(self):
        return self.policy.denoiser()

    def velocity(self, module):
        return self.policy.velocity(
            module, self.x, torch.tensor([0.9, 0.5, 0.2]), self.text, self.size, self.scale
        )

    @torch.enable_grad()
    def update(self, times=2, lr=1.0):
        for _ in range(times):
            self.runtime.accumulate(
                self.velocity(self.runtime.engine).float().square().mean(), last=True
            )
            assert self.runtime.step(lr) is not None
        return self


def tensors(module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer.", "."): t
        for name, t in (*module.named_parameters(), *module.named_buffers())
    }


def assert_one_base(trained: Trained):
    """Every tensor of the copy but its adapters lies where the engine's lies."""
    engine, copy = tensors(trained.runtime.module), tensors(trained.copy)
    own = {name for name in copy if name.endswith((".down", ".up"))}
    frozen = {name for name, t in engine.items() if not t.requires_grad}
    assert own and copy.keys() - own == frozen == engine.keys() - {
        n for n, t in engine.items() if t.requires_grad
    }
    assert all(copy[name].data_ptr() == engine[name].data_ptr() for name in frozen)
    assert not {copy[name].data_ptr() for name in own} & {t.data_ptr() for t in engine.values()}


# ---------------------------------------------------------------------------------------- the layer
@pytest.mark.parametrize("dtype, rel", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_an_adapted_layer_against_its_formula(dtype, rel, bias, shape):
    """In float64, with a scale that is no power of two; the weight and the bias are the source's
    own."""
    source = torch.nn.Linear(7, 10, bias=bias, dtype=dtype)
    layer = AdaptedLinear(source, rank=3, scale=1.7)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), source(x)), "the adapter begins as none"
        layer.down.normal_(), layer.up.normal_()
        w = source.weight.double() + 1.7 * layer.up.double() @ layer.down.double()
        want = x.double() @ w.T + (source.bias.double() if bias else 0)
        assert_close("forward", layer(x), want, rel)
        assert_close("one weight", whole_weight(layer), w, rel)
    assert (
        layer.weight is source.weight
        and layer.bias is source.bias
        and whole_weight(source).data_ptr() == source.weight.data_ptr()
    )
    assert layer(x.requires_grad_()).sum().backward() is None and x.grad is not None, (
        "a micro-batch is measured with a backward"
    )


# ----------------------------------------------------------------------------------------- one base
@pytest.mark.parametrize(
    "stage, dtype", [(0, "float32"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16")]
)
def test_the_base_is_one_and_rollouts_have_the_adapters(stage, dtype):
    """Before and after updates; the base stays as it was loaded, to the bit, and the reference is
    it."""
    trained = Trained(config_of(stage, dtype, training={"penalty": {"coef": 0.1}}))
    assert_one_base(trained)
    loaded = load_policy(str(MODEL), dtype=dtype, max_sequence_length=20).denoiser()
    with torch.no_grad():
        base = trained.velocity(loaded)
        assert torch.equal(trained.velocity(trained.copy), base), "adapters that change nothing yet"
        trained.update()
        assert torch.equal(trained.velocity(trained.copy), base), "until it is refreshed"
        trained.runtime.refresh(trained.copy)
        engine, rollout = trained.velocity(trained.runtime.engine), trained.velocity(trained.copy)
        with trained.runtime.reference_transformer() as reference:
            assert torch.equal(trained.velocity(reference), base)
        assert_close(
            "rollout and training", rollout, engine, {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
        )
        assert (engine - base).float().norm() > 1e-2 * base.float().norm(), "the adapters matter"
    assert_one_base(trained)
    for name, weight in loaded.named_parameters():
        assert torch.equal(tensors(trained.copy)[name], weight), name


@pytest.mark.parametrize("family", GUIDED)
def test_the_base_of_guided_families_is_one(family, tmp_path):
    folder = GUIDED[family](tmp_path / family)
    trained = Trained(
        config_of(1, "bfloat16", model={"path": str(folder), "max_sequence_length": 20}),
        folder,
        scale=4.0,
    )
    assert_one_base(trained.update(1))
    with torch.no_grad():
        trained.runtime.refresh(trained.copy)
        assert_close(
            "velocity",
            trained.velocity(trained.copy),
            trained.velocity(trained.runtime.engine),
            2e-2,
        )


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_weights_that_loading_keeps_in_float32(stage, tmp_path):
    """Wan's in bfloat16: trained with as the pipeline has them, so that both forwards are one, to
    the bit; at stage 3 in bfloat16."""
    folder = wan_pipeline(tmp_path / "wan", shift=3.0)
    trained = Trained(
        config_of(stage, "bfloat16", model={"path": str(folder), "max_sequence_length": 20}),
        folder,
        scale=3.0,
        size=Size(32, 32, 5),
    )
    loaded = load_policy(str(folder), dtype="bfloat16", max_sequence_length=20).denoiser()
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name.split(".")[-2] for name in kept if name.endswith(".weight")} == {
        "linear_1",  # of the time embedder
        "linear_2",
        "norm2",
    } and "scale_shift_table" in kept
    got = {n: t.dtype for n, t in tensors(trained.runtime.module).items() if n in dtypes}
    if stage == 3:
        assert set(got.values()) == {torch.bfloat16}
        return
    assert got == dtypes
    assert_one_base(trained)
    with torch.no_grad():
        base = trained.velocity(loaded)
        with trained.runtime.reference_transformer() as reference:
            assert torch.equal(trained.velocity(reference), base)
        assert torch.equal(trained.velocity(trained.copy), base)
    assert_one_base(trained.update(1))


def test_wan_alone_has_weights_in_float32():
    """Of all transformers whose cards are shipped, as docs/wan.md says."""
    found = set()
    for index in CARDS.glob("*/model_index.json"):
        table = json.loads(index.read_text())
        kinds = [value[1] for name, value in table.items() if name.startswith("transformer")]
        found |= {
            table["_class_name"]
            for kind in kinds
            if kind and getattr(diffusers, kind)._keep_in_fp32_modules
        }
    assert found == {"WanPipeline"}


def test_what_stays_in_float32_is_the_rollouts_own():
    """Where it is not the engine's: the copy keeps the precision that the model was loaded in."""
    module = torch.nn.ModuleDict(
        {"norm": torch.nn.Linear(4, 4), "block": torch.nn.Linear(4, 4, dtype=torch.bfloat16)}
    )
    module.register_buffer("table", torch.zeros(3, dtype=torch.bfloat16))
    module.register_buffer("places", torch.arange(3))
    copy = bare_copy(module, torch.bfloat16)
    before = copy["norm"].weight.clone()
    add_lora_to(module.bfloat16(), ["block"])
    adopt(copy, module, ADAPTER)
    assert copy["norm"].weight.dtype == torch.float32 and torch.equal(copy["norm"].weight, before)
    assert copy["block"].weight.data_ptr() == module["block"].base_layer.weight.data_ptr()
    assert (
        copy.table.data_ptr() == module.table.data_ptr()
        and copy.places.data_ptr() == module.places.data_ptr()
    )


def add_lora_to(module, targets):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), module, ADAPTER)


def test_only_linear_layers_are_adapted():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 4))
    copy = bare_copy(module, torch.float32)
    add_lora_to(module, ["0"])
    with pytest.raises(
        UserError, match="model.lora.targets: 0 is a Conv2d; only linear layers can be adapted"
    ):
        adopt(copy, module, ADAPTER)


def test_the_average_is_rolled_out_beside_the_trained_adapters():
    """In the copy alone: training's adapters stay; and back."""
    trained = Trained(config_of(2, rollout={"refresh_bucket": 2_000}))
    average = Average(trained.runtime, 0.5, 1)
    trained.update()
    average.update()
    with torch.no_grad():
        trained.runtime.refresh(trained.copy)
        engine, rollout = trained.velocity(trained.runtime.engine), trained.velocity(trained.copy)
        trained.runtime.refresh(trained.copy, average.gather)
        averaged = trained.velocity(trained.copy)
        values = average.gather(trained.runtime.trainable)
        other = load_policy(str(MODEL), max_sequence_length=20).denoiser()
        add_lora(other, Lora(**LORA), trained.policy.lora_targets, 0)
        for name, parameter in other.named_parameters():
            parameter.copy_(values.get(name, parameter))
        assert_close("average", averaged, trained.velocity(other), 1e-6)
        assert (averaged - rollout).norm() > 1e-3 * rollout.norm()
        assert torch.equal(trained.velocity(trained.runtime.engine), engine)
        trained.runtime.refresh(trained.copy)
        assert torch.equal(trained.velocity(trained.copy), rollout)


def test_the_float8_copy_is_made_of_merged_weights():
    trained = Trained(config_of()).update()
    trained.runtime.refresh(trained.copy)
    merged = load_policy(str(MODEL), max_sequence_length=20).denoiser()
    for name, layer in trained.copy.named_modules():
        if isinstance(layer, AdaptedLinear):
            merged.get_submodule(name).weight.data.copy_(whole_weight(layer))
    one, other = Float8Copy(trained.copy), Float8Copy(merged)
    for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    with torch.no_grad():
        before = trained.velocity(one.transformer)
        assert_close("velocity", before, trained.velocity(other.transformer), 1e-5)
        trained.update(1)
        trained.runtime.refresh(trained.copy)
        one.refresh()
        assert (trained.velocity(one.transformer) - before).norm() > 1e-3 * before.norm(), (
            "the adapters are followed"
        )


def test_nothing_that_a_graph_reads_moves():
    """Neither in updates and refreshes nor while the average is evaluated."""
    trained = Trained(config_of(2))
    average = Average(trained.runtime, 0.5, 1)

    def addresses():
        return [t.data_ptr() for t in (*trained.copy.parameters(), *trained.copy.buffers())]

    first = addresses()
    trained.update(1)
    average.update()
    for values in (None, average.gather, None):
        trained.runtime.refresh(trained.copy, values)
        assert addresses() == first


# ------------------------------------------------------------------------------------ who shares it
def test_who_shares_the_base():
    def shared(**changes):
        return shares_base(config_of(**changes), "cuda")

    assert shared() and shared(stage=2, dtype="bfloat16") and shared(share_base=True)
    assert (
        not shared(lora=None)
        and not shared(share_base=False)
        and not shared(stage=3)
        and not shared(rollout={"replica": False})
    )
    assert not shared(model={"dtype": "bfloat16"}), "of another dtype than is trained in"
    assert (
        not shares_base(config_of(model={"dtype": "auto"}), "cuda")
        and shares_base(config_of(1, model={"dtype": "bfloat16"}), "cpu") is False
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lora": None}, "needs model.lora"),
        ({"rollout": {"replica": False}}, "needs rollout.replica"),
        ({"stage": 3}, "needs ZeRO stage 0, 1 or 2"),
    ],
)
def test_a_base_that_cannot_be_shared_is_refused(changes, words):
    with pytest.raises(UserError, match=f"model.share_base: true {words}"):
        config_of(share_base=True, **changes)


def test_two_dtypes_are_refused_with_both_keys():
    with pytest.raises(
        UserError,
        match="model.share_base: .* bfloat16 by model.dtype, float32 by the deepspeed section",
    ):
        shares_base(config_of(share_base=True, model={"dtype": "bfloat16"}))


# -------------------------------------------------------------------------------------------- bytes
@pytest.mark.parametrize("share_base", [None, False])
def test_bytes_of_the_rollout_copy(share_base):
    """All that it holds beside the engine, against the dry run."""
    config = config_of(1, "bfloat16", share_base=share_base)
    trained = Trained(config)
    engine = {t.data_ptr() for t in tensors(trained.runtime.module).values()}
    own = sum(t.nbytes for t in tensors(trained.copy).values() if t.data_ptr() not in engine)
    assert own == items(estimate(config))["rollout copy"]


# --------------------------------------------------------------------------------------------- runs
RUN = {
    "model": {"lora": LORA},
    "rollout": {"num_steps": 4, "plan": {"branch_steps": [0, 2]}, "lanes": 1},
    "training": {
        "iterations": 3,
        "penalty": {"coef": 0.05},
        "ema": {"decay": 0.5, "every": 1},
        "updates": {"passes": 2},
    },
    "deepspeed": {
        "optimizer": {**ADAMW, "params": {**ADAMW["params"], "lr": 1e-2}},
        "zero_optimization": {"stage": 2},
    },
}


def test_a_run_is_that_of_two_copies(tmp_path):
    """In fp32, to its rounding; and the transformer is loaded once."""
    one = train(tmp_path, "one", processes=None, **RUN)
    two = train(
        tmp_path, "two", processes=None, **RUN | {"model": {"lora": LORA, "share_base": False}}
    )
    for mine, theirs in zip(one.rows, two.rows, strict=True):
        for key in ("reward/mean", "eval/reward", "loss", "grad_norm", "kl"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
    assert max(row["mismatch/log_prob"] for row in one.rows[1:]) < 1e-6
    assert all(
        torch.allclose(value, two.weights()[name], atol=1e-4)
        for name, value in one.weights().items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, processes):
    whole = train(tmp_path, "whole", processes=processes, **RUN, checkpoint={"every": 1, "keep": 3})
    assert whole.checkpoints == [1, 2, 3]
    shutil.copytree(whole.folder, tmp_path / "again")
    for lost in (2, 3):
        shutil.rmtree(tmp_path / f"again/checkpoints/{lost:06d}")
    again = train(
        tmp_path,
        "again",
        "--resume",
        processes=processes,
        **RUN,
        checkpoint={"every": 1, "keep": 3},
    )
    assert [timeless(row) for row in again.rows] == [timeless(row) for row in whole.rows]
    for name in ("weights", "ema"):
        mine, theirs = again.weights(name=name), whole.weights(name=name)
        assert mine.keys() == theirs.keys() and all(
            torch.equal(mine[key], theirs[key]) for key in mine
        )
