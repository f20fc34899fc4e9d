"""The dry run against reality: bytes of a real runtime's tensors, what real forwards keep, and the forwards of a real run."""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import diffusers
import pytest
import torch
from engine_cases import MODEL, ROOT, config_table, examples, small_config, write_config
from family_cases import qwen_pipeline, sd3_pipeline
from rich.console import Console
from run_cases import script_here, train

from tempflow import types
from tempflow.config import Lora, load_config
from tempflow.errors import UserError
from tempflow.estimate import estimate, local_model, measure, show
from tempflow.estimate.measure import Meter, passing_gradients
from tempflow.estimate.model import Model, module_bytes
from tempflow.models.hub import CARDS, KNOWN
from tempflow.models.loading import family_of
from tempflow.sampling.float8 import Float8Copy
from tempflow.training.engine import add_lora

pytestmark = pytest.mark.cpu  # bytes of a runtime in this process
CARD = CARDS / "flux-dev"
BF16 = {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}}


def items(result) -> dict[str, int]:
    """Bytes by the first words of their names."""
    memory = result.memory
    return {
        item.name.removeprefix("training engine: ").split(":")[0]: item.bytes for item in [*memory.resident, *memory.moments, *memory.host]
    }


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_of(inner)


def total(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ----------------------------------------------------------------------------------------------------- against reality
VARIANTS = {
    "float8": {"rollout": {"suffix": {"weights": "float8"}}},
    "full": {"training": {"ema": {"decay": 0.5}, "penalty": {"coef": 0.01}}},
    "lora": {"model": {"lora": {"rank": 4, "alpha": 8.0}}, "training": {"merge": {"last": 2, "every": 1}, "penalty": {"coef": 0.01}}},
    "sgd, no copy": {"rollout": {"replica": False}, "deepspeed": {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}},
}
GUIDED = {"sd3": sd3_pipeline, "qwen_image": qwen_pipeline}
TEXT = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline folder by family: the shipped model, and tiny ones of the guided families."""
    made = {"flux": MODEL}

    def get(family):
        if family not in made:
            made[family] = GUIDED[family](tmp_path_factory.mktemp(family))
        return made[family]

    return get


def training_forward(policy, module, scale, rows, size):
    """Conditioning, latents and sigmas of some rows, and a function that makes their velocities with `module`."""
    conditioning = {name: tensor.clone() for name, tensor in policy.encode(examples(['the word "ABC"'] * rows)).items()}
    x, sigma = torch.randn(rows, *policy.latent_shape(size)), torch.full((rows,), 0.5)
    return (x, sigma, *conditioning.values()), lambda: policy.velocity(module, x, sigma, conditioning, size, scale)


def training_peak(module, velocity) -> int:
    """The most bytes that a forward and its backward hold."""
    with passing_gradients(module), Meter() as held:
        velocity().square().mean().backward()
    return held.peak


@pytest.mark.parametrize("family, variant", [*[("flux", v) for v in VARIANTS], *[(f, v) for f in GUIDED for v in ("full", "lora")]])
def test_bytes_of_a_real_runtime(folders, family, variant):
    """Every resident byte at ZeRO stage 0 after one step, and the activations of its training module, in one process."""
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
    copied = policy.transformer
    runtime = Runtime(config, policy)
    average = make_average(config, runtime)
    held = training_peak(runtime.module, training_forward(policy, runtime.module, scale, rows, size)[1])
    runtime.accumulate(training_forward(policy, runtime.engine, scale, rows, size)[1]().square().mean(), last=True)
    gradients = total(p.grad for p in runtime.trainable.values())
    assert runtime.step(1.0) is not None

    seen = items(estimate(config))
    assert seen["parameters"] == module_bytes(runtime.module)
    assert seen["gradients"] == gradients
    assert seen["optimizer"] == total(tensors_of(dict(runtime.engine.optimizer.state)))
    assert seen.get("rollout copy", 0) == (module_bytes(copied) if config.rollout.replica else 0)
    float8 = total(Float8Copy(copied).tensors()) if variant == "float8" else 0
    assert seen.get("float8 copy for suffixes", 0) == float8
    assert seen["VAE"] == module_bytes(policy.pipe.vae)
    encoders = [module for name, module in policy.pipe.components.items() if name.startswith("text_encoder")]
    assert seen["text encoders"] == sum(map(module_bytes, encoders))
    assert seen.get("reference copy", 0) == (module_bytes(runtime.reference) if runtime.reference is not None else 0)
    if average:
        average.update(), average.update()
        copies = [average._means] if config.training.ema else average._snapshots
        assert seen["average"] == total(tensors_of(dict(enumerate(copies))))
        assert seen["average"] == len(copies) * total(average.gather(runtime.trainable).values())
    # 12 decisions of a micro-batch of 6
    measured = items(estimate(small_config(**{**changes, "training": {**changes.get("training", {}), "micro_batch": rows}})))
    assert measured["training"] == pytest.approx(held, rel=0.15)


def described(folder, scale, **model) -> Model:
    """The dry run's, of images of 32 x 96 in fp32."""
    model = {"path": str(folder), "dtype": "float32", "max_sequence_length": TEXT, **model}
    return Model(small_config(model=model, rollout={"guidance_scale": scale}))


@pytest.mark.parametrize("family, scale", [("flux", 0.0), *[(f, s) for f in GUIDED for s in (1.0, 4.5)]])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_real_forward(folders, family, scale, rows, checkpointing):
    """The most that the real model's forward and backward hold, on the CPU with its fused attention."""
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
        table = {"attention_head_dim": 16, "num_attention_heads": 2, "patch_size": 1 if kind.startswith("Flux") else 2}
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
        given |= {"img_ids": torch.empty(20, 3, device="meta"), "txt_ids": torch.empty(7, 3, device="meta")}
    return given


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("checkpointing, lora", [(False, False), (True, False), (False, True)])
def test_three_blocks_stand_for_all(kind, checkpointing, lora):
    """To the byte and to the operation, but for the states of random number generators that checkpointing keeps on the CPU."""
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
    assert seen[0][:3] == seen[1][:3] and seen[1][3] == pytest.approx(seen[0][3], abs=9 * 6000 * checkpointing)


@pytest.mark.parametrize("family", ["flux", *GUIDED])
def test_a_forward_without_gradients(folders, family):
    """The most that the real model holds at once in a forward of the rollout, guided where the family is, and embeddings."""
    from tempflow.models import load_policy

    policy, rows, size = load_policy(str(folders(family)), max_sequence_length=TEXT), 4, types.Size(32, 96)
    inputs, velocity = training_forward(policy, policy.transformer, 4.5, rows, size)
    with torch.no_grad(), Meter() as held:
        velocity()

    model = described(folders(family), 4.5)
    assert model.forward(rows).bytes == pytest.approx(held.peak, rel=0.15)
    assert rows * sum(model.embedding) == total(inputs[2:])


RUNS = {
    "tempflow": {"rollout": {"suffix": {"stride": 2, "exact_steps": 1}}, "training": {"updates": {"passes": 2}, "penalty": {"coef": 0.01}}},
    "random steps": {"rollout": {"plan": {"branch_steps": {"random": 2}}}},
    "flow_grpo": {
        "rollout": {"plan": {"type": "flow_grpo", "branch_steps": "all", "seeds": 3}},
        "training": {"advantage": {"over": "prompt"}, "updates": {"parts": 2}},
    },
    "values": {
        "rollout": {"plan": {"type": "flow_grpo", "branch_steps": [0, 2], "seeds": 3, "values": True}, "num_steps": 4},
        "training": {"advantage": {"type": "dense"}},
    },
    "samples": {
        "rollout": {"plan": {"type": "samples", "seeds": 3}, "num_steps": 4},
        "training": {"advantage": {"over": "prompt"}, "objective": {"type": "nft", "draws": 2}, "updates": {"passes": 2}},
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


# ----------------------------------------------------------------------------------------------------------- FLUX.1-dev
@pytest.fixture(scope="module")
def flux():
    """The shipped configs as they stand, by hub id, without a network."""
    return {
        "lora": estimate(load_config(ROOT / "configs/flux_lora.json")),
        "zero3": estimate(load_config(ROOT / "configs/flux_zero3.json"), gpus=8),
    }


def modules_of(card) -> dict[str, torch.nn.Module]:
    """The modules of a card's policy, by name."""
    folder = str(CARD.with_name(card))
    parts = family_of(folder).skeleton(folder, torch.bfloat16).pipe.components
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def parameters(card) -> dict[str, int]:
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules_of(card).items()}


def test_the_card_of_flux_dev(flux):
    assert flux["zero3"].parameters == flux["zero3"].trained == 11_901_408_320
    counted = {name: count / 1e6 for name, count in parameters("flux-dev").items() if name != "transformer"}
    assert counted == pytest.approx({"text_encoder": 123.06, "text_encoder_2": 4762.31, "vae": 83.82}, rel=1e-4)


# The totals of KerasHub's ports, without T5: https://github.com/keras-team/keras-hub, stable_diffusion_3_presets.py
KERAS_HUB = {"sd35-medium": 3_371_793_763, "sd35-large": 9_048_410_595}


@pytest.mark.parametrize("card", KERAS_HUB)
def test_the_cards_of_sd35(card):
    modules = modules_of(card)
    tensors = [t for name, part in modules.items() if name != "text_encoder_3" for t in (*part.parameters(), *part.buffers())]
    assert sum(t.numel() for t in tensors if t.is_floating_point()) == KERAS_HUB[card]


def test_the_cards_of_flux_schnell_and_qwen_image():
    schnell, qwen = parameters("flux-schnell"), parameters("qwen-image")
    embedder = 256 * 3072 + 3072 + 3072**2 + 3072  # of the guidance scale
    assert schnell["transformer"] == 11_901_408_320 - embedder and qwen["transformer"] == 20_430_401_088
    assert qwen["text_encoder"] == 8_292_166_656, "as the hub says of Qwen2.5-VL-7B"


@pytest.mark.parametrize("family", GUIDED)
def test_guidance_doubles_a_forward(folders, family):
    """Where it is true guidance: twice the operations of a row, which is counted as one, as the metrics do."""
    model = {"path": str(folders(family)), "max_sequence_length": TEXT}
    plain, guided = (estimate(small_config(model=model, rollout={"guidance_scale": scale})) for scale in (1, 4.5))
    for phase in ("rollout", "training"):
        assert guided.phase(phase).flops == 2 * plain.phase(phase).flops
        assert guided.phase(phase).forwards == plain.phase(phase).forwards
    assert items(guided)["training"] / items(plain)["training"] == pytest.approx(2, rel=0.2)
    assert items(guided)["rollout copy"] == items(plain)["rollout copy"]


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [("sd35_lora", []), ("qwen_image_lora", ["rollout.replica=false"])])
def test_shipped_guided_configs_fit_their_cards(name, changes):
    """On one 80 GB card; Qwen-Image with its copy on one of 141 GB."""
    file = ROOT / f"configs/{name}.json"
    assert estimate(load_config(file, changes)).fits
    assert estimate(load_config(file), card_gb=141).fits
    assert estimate(load_config(file)).fits == (not changes)


def test_an_hour_of_the_first_run_on_flux():
    """The page's numbers are the dry run's; ten evaluations, and minutes left to load the model."""
    spec = importlib.util.spec_from_file_location("make_configs_page", ROOT / "docs/make_configs_page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    said, config = page.FIRST, load_config(ROOT / "configs/flux_first.json")
    result = estimate(config, mfu=said["mfu"])
    assert result.fits and result.total / 1e9 == pytest.approx(said["gb"], abs=0.06)
    assert result.speed / 1e12 == pytest.approx(said["tflops"], abs=0.5)
    seconds = {phase.name: phase.seconds for phase in result.phases}
    assert seconds == pytest.approx({name: said[name] for name in seconds}, abs=0.06)
    rollout = result.phase("rollout")
    assert (rollout.forwards, rollout.flops / 1e12) == (said["forwards"], pytest.approx(said["tflop"], abs=0.06))
    iterations, evaluation = config.training.iterations, seconds.pop("evaluation")
    evaluations = 1 + -(-iterations // config.eval.every)
    assert evaluations == 10 and iterations * sum(seconds.values()) + evaluations * evaluation < 55 * 60


def test_shipped_flux_configs_fit_their_cards(flux):
    """As the README's section on FLUX.1 says."""
    lora, zero3 = items(flux["lora"]), items(flux["zero3"])
    assert flux["lora"].fits and flux["zero3"].fits
    assert lora["rollout copy"] == zero3["rollout copy"] == 2 * 11_901_408_320
    assert zero3["parameters"] + zero3["gradients"] + zero3["optimizer"] == pytest.approx(18 * 11_901_408_320 / 8, rel=1e-3)
    assert zero3["average"] == 4 * 11_901_408_320 / 8 and "reference copy" not in zero3
    assert flux["lora"].phase("rollout").forwards == 48 * (10 + 6 * 45) and flux["lora"].phase("training").forwards == 48 * 9
    assert flux["zero3"].phase("rollout").busiest * 8 == flux["zero3"].phase("rollout").forwards


def test_operations_of_a_forward(flux):
    """Twice the weights for every token that passes them, and attention's two products, to within what is left out here."""
    tokens, width, layers = 4096 + 512, 3072, 19 + 38
    blocks = 38 * 12 * width**2  # a single block's weights that see every token; a double block's are two sets, one a token
    blocks += 19 * 12 * width**2
    by_hand = 2 * tokens * blocks + layers * 4 * tokens**2 * width
    assert flux["lora"].phase("rollout").flops == pytest.approx(by_hand, rel=0.01)
    backward = flux["zero3"].phase("training").flops / flux["zero3"].phase("rollout").flops
    assert 4 < backward < 4.2, "twice a forward, and the forward again for checkpointing; attention's backward recomputes scores"


def test_what_does_not_fit_is_said():
    """All weights on one GPU: its largest parts, with the keys that decide them."""
    result = estimate(load_config(ROOT / "configs/flux_zero3.json", ["data.prompts_per_iteration=1"]))
    text = " ".join(printed(result).split("Most of it:")[1].split("Change these keys")[0].split())
    largest = sorted(result.memory.resident, key=lambda item: -item.bytes)[:3]
    assert not result.fits and [text.index(item.name) for item in largest] == sorted(text.index(item.name) for item in largest)
    assert "142.8 GB training engine: optimizer: model.lora, zero_optimization.stage, offload_optimizer" in text
    assert "training: activations of" in text, "the largest of the moments"


def test_text_encoders_leave_where_embeddings_are_cached():
    """From every GPU, and from the host before the rest is loaded."""
    stay, gone = (estimate(small_config(data={"embedding_cache": cache}), card_gb=0.001) for cache in (None, "elsewhere"))
    encoders, rest = items(stay)["text encoders"], items(stay)["VAE"] + items(stay)["rollout copy"]
    assert "text encoders" not in items(gone) and stay.total - gone.total == encoders > 0
    assert stay.memory.start == encoders + rest and gone.memory.start == max(encoders, rest)


def test_a_graph_keeps_what_a_forward_holds():
    """All along, beside the eager forward that it is compared with; without it that much is free."""
    plain, graphs = (estimate(small_config(rollout={"graphs": value}), card_gb=0.001) for value in (False, True))
    forward = next(item.bytes for item in plain.memory.moments if item.name.startswith("rollout: a forward"))
    assert graphs.total - plain.total == items(graphs)["CUDA graph of the rollout"] == forward > 0
    assert "CUDA graph of the rollout" not in items(plain)


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
    assert guided["evaluation"] == moments(4.5, None)["rollout"] > 1.5 * guided["rollout"] and guided["rollout"] == plain["rollout"]


def test_a_penalty_keeps_a_reference():
    """The copy, and its velocity at every state."""
    plain, penalised = (estimate(small_config(training={"penalty": penalty})) for penalty in (None, {"coef": 0.1}))
    reference = items(penalised)["reference copy"]
    assert reference == items(penalised)["parameters"] and penalised.total - plain.total == reference + 12 * 48 * 32 * 4


ZERO = [  # stage, more of the section, bytes per trained weight on one of four GPUs: parameters, gradients, optimizer
    (1, {"data_types": {"grad_accum_dtype": "fp32"}}, 2, 4, 12 / 4),
    (1, {}, 2, 2 + 2 / 4, 12 / 4),
    (2, {}, 2, 2 / 4, 12 / 4),
    (3, {}, 2 / 4, 2 / 4, 12 / 4),
    (3, {"data_types": {"grad_accum_dtype": "fp32"}}, 2 / 4, 4 / 4, 12 / 4),
]


@pytest.mark.parametrize("stage, more, parameters, gradients, optimizer", ZERO)
def test_zero_stages(stage, more, parameters, gradients, optimizer):
    result = estimate(small_config(deepspeed={**BF16, **more, "zero_optimization": {"stage": stage}}), gpus=4)
    seen, count = items(result), result.trained
    assert [seen["parameters"] / count, seen["gradients"] / count, seen["optimizer"] / count] == pytest.approx(
        [parameters, gradients, optimizer], rel=1e-4
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
    assert total(p.ds_tensor for p in parameters) == seen["reference copy"] == 4 * sum(p.ds_numel for p in parameters)


def test_where_the_reference_is():
    """Bytes of the copy on one of four GPUs, and in host memory."""

    def of(stage, reference=None):
        deepspeed = {**BF16, "zero_optimization": {"stage": stage}}
        memory = estimate(small_config(training={"penalty": {"coef": 0.01}, "reference": reference}, deepspeed=deepspeed), gpus=4).memory
        return [sum(i.bytes for i in part if i.name.startswith("reference copy")) for part in (memory.resident, memory.host)]

    whole = of(2)[0]
    assert of(2) == of(3, "whole") == of(2, "whole") == [whole, 0] and whole > 0
    assert of(3) == of(3, "sharded") == of(2, "sharded") == [whole / 4, 0]
    assert of(3, "offloaded") == [0, whole / 4]


def test_offloading_moves_bytes_to_the_host():
    ds = {**BF16, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    here, there = (estimate(small_config(deepspeed=section), gpus=2) for section in ({**BF16, "zero_optimization": {"stage": 2}}, ds))
    assert "optimizer" not in items(there) and items(there)["offloaded by DeepSpeed"] >= items(here)["optimizer"]


# -------------------------------------------------------------------------------------------------------------- command
def printed(result) -> str:
    out = io.StringIO()
    show(result, Console(file=out, width=140))
    return out.getvalue()


def test_dry_run_loads_and_writes_nothing(tmp_path, skeleton):
    """A folder without weights will do."""
    file = write_config(tmp_path, model={"path": str(skeleton)}, logging={"dir": str(tmp_path / "runs")})
    done = script_here("train", "--config", file, "--dry-run", "--gpus", 2)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("2 GPUs of 80.0 GB", "rollout copy", "Fits", "training (with backward)", "Host memory"))
    assert not (tmp_path / "runs").exists()


def test_dry_run_says_that_it_does_not_fit(tmp_path):
    done = script_here("train", "--config", write_config(tmp_path), "--dry-run", "--card-gb", 0.02)
    assert done.returncode == 0, done.stderr
    assert "Does not fit" in done.stdout and "Most of it:" in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpus", 0], ["--gpus", "from 1 to"]),
        (["--mfu", "nan"], ["--mfu"]),
        (["--card-gb", -1], ["--card-gb"]),
        (["--gpus", 5], ["data.prompts_per_iteration x rollout.plan.seeds", "4 units for 5 GPUs"]),
        (["--set", "model.path=someone/else"], ["model.path", "someone/else"]),
        (["--set", "rollout.height=30"], ["rollout.height", "multiples of 8"]),
        (
            ["--set", "model.path=stabilityai/stable-diffusion-3.5-large", "--set", "rollout.height=3088"],
            ["rollout.height", "3088 x 96", "at most 3072 a side"],
        ),
        (["--set", 'model.lora={"targets": ["nothing"]}'], ["model.lora", "nothing"]),
        (["--set", 'deepspeed.zero_optimization={"stage": 2, "reduce_bucket_size": "big"}'], ["reduce_bucket_size", "'big'"]),
    ],
)
def test_dry_run_refuses(tmp_path, arguments, words):
    done = script_here("train", "--config", write_config(tmp_path), "--dry-run", *arguments)
    assert done.returncode == 2 and done.stdout == "" and all(word in done.stderr for word in words), done.stdout + done.stderr


def test_known_hub_ids_are_read_from_their_cards(tmp_path):
    assert local_model("black-forest-labs/FLUX.1-dev") == str(CARD)
    assert all(Path(local_model(known)).is_dir() for known in KNOWN)
    assert local_model(str(MODEL)) == str(MODEL) and local_model("someone/else") == "someone/else"


def test_a_family_without_inputs_is_refused(tmp_path, skeleton):
    index = json.loads((skeleton / "model_index.json").read_text())
    index["transformer"][1] = "SanaTransformer2DModel"
    (skeleton / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="SanaTransformer2DModel"):
        estimate(small_config(model={"path": str(skeleton)}))


def test_numbers_beyond_all_machines_are_printed():
    most = 2**31 - 1
    config = small_config(data={"prompts_per_iteration": most}, rollout={"plan": {"seeds": most}}, training={"updates": {"passes": most}})
    result = estimate(config)
    assert not result.fits and printed(dataclasses.replace(result)) and config_table()
