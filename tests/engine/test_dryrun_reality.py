"""The dry run against reality: bytes of a real runtime's tensors, what real forwards keep, and the
forwards of a real run."""

import weakref
from contextlib import nullcontext

import diffusers
import pytest
import torch
from dryrun_cases import CARD, items
from engine_cases import MODEL, examples, small_config
from run_cases import train

from tempflow import types
from tempflow.config import Lora, load_config
from tempflow.estimate import estimate, measure
from tempflow.estimate.measure import Meter, passing_gradients
from tempflow.estimate.model import Model, module_bytes
from tempflow.models.loading import family_of
from tempflow.sampling.float8 import Float8Copy
from tempflow.training.engine import add_lora

pytestmark = pytest.mark.cpu  # bytes of a runtime in this process


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_of(inner)


def total(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


VARIANTS = {
    "float8": {"rollout": {"suffix": {"weights": "float8"}}},
    "full": {"training": {"ema": {"decay": 0.5}, "penalty": {"coef": 0.01}}},
    "lora": {
        "model": {"lora": {"rank": 4, "alpha": 8.0}},
        "training": {"merge": {"last": 2, "every": 1}, "penalty": {"coef": 0.01}},
    },
    "sgd, no copy": {
        "rollout": {"replica": False},
        "deepspeed": {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
    },
}


GUIDED = ("sd3", "qwen_image", "flux2")


TEXT = 20


@pytest.fixture(scope="module")
def folders(family_folders):
    """A pipeline folder by family: the shipped model, and tiny ones of the guided families."""
    return lambda family: MODEL if family == "flux" else family_folders(family)


def training_forward(policy, module, scale, rows, size):
    """Conditioning, latents and sigmas of some rows, and a function that makes their velocities
    with `module`."""
    conditioning = {
        name: tensor.clone()
        for name, tensor in policy.encode(examples(['the word "ABC"'] * rows)).items()
    }
    x, sigma = torch.randn(rows, *policy.latent_shape(size)), torch.full((rows,), 0.5)
    return (x, sigma, *conditioning.values()), lambda: policy.velocity(
        module, x, sigma, conditioning, size, scale
    )


def training_peak(module, velocity) -> int:
    """The most bytes that a forward and its backward hold."""
    with passing_gradients(module), Meter() as held:
        velocity().square().mean().backward()
    return held.peak


@pytest.mark.parametrize(
    "family, variant",
    [*[("flux", v) for v in VARIANTS], *[(f, v) for f in GUIDED for v in ("full", "lora")]],
)
def test_bytes_of_a_real_runtime(folders, family, variant):
    """Every resident byte at ZeRO stage 0 after one step, and the activations of its training
    module, in one process."""
    from tempflow.models import load_policy
    from tempflow.training.distributed import init_distributed
    from tempflow.training.engine import Runtime
    from tempflow.training.session import make_average

    init_distributed()
    scale, rows, size = 0.0 if family == "flux" else 4.5, 6, types.Size(32, 96)
    changes = VARIANTS[variant]
    changes = {
        **changes,
        "model": {"path": str(folders(family)), **changes.get("model", {})},
        "rollout": {"guidance_scale": scale, **changes.get("rollout", {})},
    }
    config = small_config(**changes)
    policy = load_policy(str(folders(family)), max_sequence_length=TEXT)
    runtime = Runtime(config, policy)
    average = make_average(config, runtime)
    held = training_peak(
        runtime.module, training_forward(policy, runtime.module, scale, rows, size)[1]
    )
    runtime.accumulate(
        training_forward(policy, runtime.engine, scale, rows, size)[1]().square().mean(), last=True
    )
    gradients = total(p.grad for p in runtime.trainable.values())
    assert runtime.step(1.0) is not None

    seen = items(estimate(config))
    assert seen["parameters"] == module_bytes(runtime.module)
    assert seen["gradients"] == gradients
    assert seen["optimizer"] == total(tensors_of(dict(runtime.engine.optimizer.state)))
    engine, copy = (
        {t.data_ptr(): t for t in (*m.parameters(), *m.buffers())}
        for m in (runtime.module, policy.transformer)
    )
    assert seen.get("rollout copy", 0) == total(
        copy[address] for address in copy.keys() - engine.keys()
    )
    float8 = total(Float8Copy(policy.transformer).tensors()) if variant == "float8" else 0
    assert seen.get("float8 copy for suffixes", 0) == float8
    assert seen["VAE"] == module_bytes(policy.pipe.vae)
    encoders = [
        module for name, module in policy.pipe.components.items() if name.startswith("text_encoder")
    ]
    assert seen["text encoders"] == sum(map(module_bytes, encoders))
    assert seen.get("reference copy", 0) == (
        module_bytes(runtime.reference) if runtime.reference is not None else 0
    )
    if average:
        average.update(), average.update()
        copies = [average._means] if config.training.ema else average._snapshots
        assert seen["average"] == total(tensors_of(dict(enumerate(copies))))
        assert seen["average"] == len(copies) * total(average.gather(runtime.trainable).values())
    # 12 decisions of a micro-batch of 6
    measured = items(
        estimate(
            small_config(
                **{**changes, "training": {**changes.get("training", {}), "micro_batch": rows}}
            )
        )
    )
    assert measured["training"] == pytest.approx(held, rel=0.15)


def described(folder, scale, **model) -> Model:
    """The dry run's, of images of 32 x 96 in fp32."""
    model = {"path": str(folder), "dtype": "float32", "max_sequence_length": TEXT, **model}
    return Model(small_config(model=model, rollout={"guidance_scale": scale}), images=0)


@pytest.mark.parametrize(
    "family, scale", [("flux", 0.0), *[(f, s) for f in GUIDED for s in (1.0, 4.5)]]
)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_real_forward(folders, family, scale, rows, checkpointing):
    """The most that the real model's forward and backward hold, on the CPU with its fused
    attention."""
    from tempflow.models import load_policy

    policy, size = load_policy(str(folders(family)), max_sequence_length=TEXT), types.Size(32, 96)
    module = policy.transformer.requires_grad_(True).train()
    if checkpointing:
        module.enable_gradient_checkpointing()
    held = training_peak(module, training_forward(policy, module, scale, rows, size)[1])

    model = described(folders(family), scale, gradient_checkpointing=checkpointing)
    assert model.training(rows).bytes == pytest.approx(held, rel=0.15)


TRANSFORMERS = {
    "FluxTransformer2DModel": {
        "num_layers": 4,
        "num_single_layers": 5,
        "in_channels": 16,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    },
    "SD3Transformer2DModel": {
        "num_layers": 9,
        "dual_attention_layers": (0, 1, 2, 3),
        "in_channels": 4,
        "sample_size": 16,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 24,
        "qk_norm": "rms_norm",
    },
}


def transformer(kind, lora) -> torch.nn.Module:
    """Of a few more blocks than are left of them, on the meta device; and a forward's arguments."""
    with torch.device("meta"):
        table = {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "patch_size": 1 if kind.startswith("Flux") else 2,
        }
        module = getattr(diffusers, kind)(**table, **TRANSFORMERS[kind])
    if lora:
        add_lora(module, Lora(rank=2, alpha=1.0), family_of(str(CARD)).lora_targets, 0)
    return module.train()


def arguments_of(kind, rows) -> dict:
    shapes = {
        "hidden_states": (20, 16) if kind.startswith("Flux") else (4, 8, 10),
        "encoder_hidden_states": (7, 24),
        "pooled_projections": (24,),
        "timestep": (),
    }
    given = {name: torch.empty(rows, *shape, device="meta") for name, shape in shapes.items()}
    if kind.startswith("Flux"):
        given |= {
            "img_ids": torch.empty(20, 3, device="meta"),
            "txt_ids": torch.empty(7, 3, device="meta"),
        }
    return given


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("checkpointing, lora", [(False, False), (True, False), (False, True)])
def test_three_blocks_stand_for_all(kind, checkpointing, lora):
    """To the byte and to the operation, but for the states of random number generators that
    checkpointing keeps on the CPU."""
    given, seen = arguments_of(kind, 3), []
    for short in (False, True):
        module = transformer(kind, lora)
        whole = len(list(module.parameters()))
        blocks = measure.shorten(module) if short else []
        assert (len(list(module.parameters())) < whole) == short
        if checkpointing:
            module.enable_gradient_checkpointing()

        def run(module=module):
            return module(**given, return_dict=False)[0]

        train, infer = measure.training(run, module, blocks), measure.inference(run, blocks)
        seen.append((train.flops, infer.flops, infer.peak, train.peak))
    assert seen[0][:3] == seen[1][:3] and seen[1][3] == pytest.approx(
        seen[0][3], abs=9 * 6000 * checkpointing
    )


@pytest.mark.parametrize("family", ["flux", *GUIDED])
def test_a_forward_without_gradients(folders, family):
    """The most that the real model holds at once in a forward of the rollout, guided where the
    family is, and embeddings."""
    from tempflow.models import load_policy

    policy, rows, size = (
        load_policy(str(folders(family)), max_sequence_length=TEXT),
        4,
        types.Size(32, 96),
    )
    inputs, velocity = training_forward(policy, policy.transformer, 4.5, rows, size)
    with torch.no_grad(), Meter() as held:
        velocity()

    model = described(folders(family), 4.5)
    assert model.forward(rows).bytes == pytest.approx(held.peak, rel=0.15)
    assert rows * sum(model.embedding) == total(inputs[2:])


RUNS = {
    "tempflow": {
        "rollout": {"suffix": {"stride": 2, "exact_steps": 1}},
        "training": {"updates": {"passes": 2}, "penalty": {"coef": 0.01}},
    },
    "random steps": {"rollout": {"plan": {"branch_steps": {"random": 2}}}},
    "flow_grpo": {
        "rollout": {"plan": {"type": "flow_grpo", "branch_steps": "all", "seeds": 3}},
        "training": {"advantage": {"over": "prompt"}, "updates": {"parts": 2}},
    },
    "values": {
        "rollout": {
            "plan": {"type": "flow_grpo", "branch_steps": [0, 2], "seeds": 3, "values": True},
            "num_steps": 4,
        },
        "training": {"advantage": {"type": "dense"}},
    },
    "samples": {
        "rollout": {"plan": {"type": "samples", "seeds": 3}, "num_steps": 4},
        "training": {
            "advantage": {"over": "prompt"},
            "objective": {"type": "nft", "draws": 2},
            "updates": {"passes": 2},
        },
    },
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_forwards_of_a_real_run(tmp_path, changes):
    changes = {**changes, "training": {"iterations": 1, **changes.get("training", {})}}
    run = train(tmp_path, "one", processes=None, **changes)
    row = run.rows[-1]
    result = estimate(load_config(tmp_path / "one.json"))
    assert row["reward/zero_std_groups"] == 0, "else there is less to train on, as the table says"
    assert result.phase("rollout").forwards == row["forwards/rollout"]
    assert result.phase("decode").forwards == row["images"]
    counted = [result.phase(name) for name in ("training", "reference", "old policy")]
    assert sum(phase.forwards for phase in counted if phase) == row["forwards/train"]


@pytest.mark.parametrize("family", GUIDED)
def test_guidance_doubles_a_forward(folders, family):
    """Where it is true guidance: twice the operations of a row, which is counted as one, as the
    metrics do."""
    model = {"path": str(folders(family)), "max_sequence_length": TEXT}
    plain, guided = (
        estimate(small_config(model=model, rollout={"guidance_scale": scale})) for scale in (1, 4.5)
    )
    for phase in ("rollout", "training"):
        assert guided.phase(phase).flops == 2 * plain.phase(phase).flops
        assert guided.phase(phase).forwards == plain.phase(phase).forwards
    assert items(guided)["training"] / items(plain)["training"] == pytest.approx(2, rel=0.2)
    assert items(guided)["rollout copy"] == items(plain)["rollout copy"]


def test_evaluations_may_be_guided_where_rollouts_are_not(folders):
    """Then their forward holds twice as much."""

    def moments(rollout, guidance):
        config = small_config(
            model={"path": str(folders("sd3")), "max_sequence_length": TEXT},
            rollout={"guidance_scale": rollout},
            eval={"prompts": 48, "guidance_scale": guidance},
        )
        return {item.name.split(":")[0]: item.bytes for item in estimate(config).memory.moments}

    plain, guided = moments(1, 1), moments(1, 4.5)
    assert "evaluation" not in plain and "evaluation" not in moments(4.5, 1)
    assert (
        guided["evaluation"] == moments(4.5, None)["rollout"] > 1.5 * guided["rollout"]
        and guided["rollout"] == plain["rollout"]
    )


@pytest.mark.parametrize("where", ["sharded", "offloaded"])
def test_bytes_of_a_spread_reference(where):
    """Its partitions on the one rank that this process is."""
    from tempflow.models import load_policy
    from tempflow.training.distributed import init_distributed
    from tempflow.training.engine import Runtime

    init_distributed()
    config = small_config(training={"penalty": {"coef": 0.01}, "reference": where})
    runtime = Runtime(config, load_policy(str(MODEL), max_sequence_length=TEXT))
    parameters = list(runtime.reference.parameters())
    seen = items(estimate(config))
    assert (
        total(p.ds_tensor for p in parameters)
        == seen["reference copy"]
        == 4 * sum(p.ds_numel for p in parameters)
    )


@pytest.fixture
def gathered_copies(monkeypatch):
    """Storages of the weights that ZeRO-3 gathers. One rank would use its partitions instead of
    copies of them. Linear layers are PyTorch's own until a runtime replaces them."""
    from deepspeed.runtime.zero import partition_parameters

    found, functional = [], torch.nn.functional
    replaced = partition_parameters.InsertPostInitMethodToModuleSubClasses
    monkeypatch.setattr(functional, "linear", getattr(replaced, "linear_bk", functional.linear))

    def copying(real):
        def init(self, params):
            real(self, params)
            for param in params if isinstance(params, list) else [params]:
                param.data = param.data.clone()
                found.append(weakref.ref(param.data.untyped_storage()))

        return init

    for handle in (
        partition_parameters.NoGatherHandle,
        partition_parameters.NoGatherCoalescedHandle,
    ):
        monkeypatch.setattr(handle, "__init__", copying(handle.__init__))
    return found


@pytest.mark.parametrize("family, lora", [("flux", None), ("sd3", {"rank": 2, "alpha": 2.0})])
def test_weights_that_stay_gathered(folders, family, lora, gathered_copies):
    """Between a forward and its backward at ZeRO stage 3: those of linear layers outside of
    checkpointed blocks, unless DeepSpeed's own linear layer is asked for."""
    from tempflow.models import load_policy
    from tempflow.training.distributed import init_distributed
    from tempflow.training.engine import Runtime

    init_distributed()
    scale, rows, size = 0.0 if family == "flux" else 4.5, 2, types.Size(32, 96)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    default, other = (
        small_config(
            model={"path": str(folders(family)), "gradient_checkpointing": True, "lora": lora},
            deepspeed={"zero_optimization": zero | own},
        )
        for own in ({}, {"memory_efficient_linear": True})
    )
    said = Model(default).training(rows).bytes - Model(other).training(rows).bytes
    policy = load_policy(str(folders(family)), max_sequence_length=TEXT)
    module = policy.transformer.train().requires_grad_(True)
    if lora:
        add_lora(module, Lora(**lora), policy.lora_targets, 0)
    module.enable_gradient_checkpointing()
    velocity, live = training_forward(policy, module, scale, rows, size)[1], []
    velocity()  # tables that the policy makes once
    for counting in (lambda *_: nullcontext(), measure.kept_weights):
        with Meter() as meter, counting(module, meter):
            graph = velocity()
            live.append(meter.live)
            del graph

    held = []
    for config in (default, other):  # the second one replaces F.linear
        runtime = Runtime(config, load_policy(str(folders(family)), max_sequence_length=TEXT))
        graph = training_forward(policy, runtime.engine, scale, rows, size)[1]()
        assert {p.ds_status.name for p in runtime.module.parameters()} == {"NOT_AVAILABLE"}
        held.append(sum(copy().nbytes() for copy in gathered_copies if copy() is not None))
        assert graph.requires_grad
        runtime.engine.destroy()
        del graph
    assert held == [live[1] - live[0], 0] and said <= held[0]
    # Of adapters alone only the last layer's weight is kept, and it is gone before the peak.
    assert (said > 0) == (lora is None)
