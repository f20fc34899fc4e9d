"""The dry run: model cards, the shipped configs, what moves bytes from where to where, and the
command."""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from dryrun_cases import CARD, items
from engine_cases import MODEL, ROOT, config_table, small_config, write_config
from rich.console import Console
from run_cases import script_here

from tempflow.config import load_config
from tempflow.errors import UserError
from tempflow.estimate import estimate, local_model, show
from tempflow.models.hub import KNOWN
from tempflow.models.loading import family_of

pytestmark = pytest.mark.cpu  # bytes of a runtime in this process
BF16 = {
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
}


# --------------------------------------------------------------------------------------- FLUX.1-dev
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
    return {
        name: sum(p.numel() for p in module.parameters())
        for name, module in modules_of(card).items()
    }


def test_the_card_of_flux_dev(flux):
    assert flux["zero3"].parameters == flux["zero3"].trained == 11_901_408_320
    counted = {
        name: count / 1e6 for name, count in parameters("flux-dev").items() if name != "transformer"
    }
    assert counted == pytest.approx(
        {"text_encoder": 123.06, "text_encoder_2": 4762.31, "vae": 83.82}, rel=1e-4
    )


# The totals of KerasHub's ports, without T5: https://github.com/keras-team/keras-hub,
# stable_diffusion_3_presets.py
KERAS_HUB = {"sd35-medium": 3_371_793_763, "sd35-large": 9_048_410_595}


@pytest.mark.parametrize("card", KERAS_HUB)
def test_the_cards_of_sd35(card):
    modules = modules_of(card)
    tensors = [
        t
        for name, part in modules.items()
        if name != "text_encoder_3"
        for t in (*part.parameters(), *part.buffers())
    ]
    assert sum(t.numel() for t in tensors if t.is_floating_point()) == KERAS_HUB[card]


def test_the_cards_of_flux_schnell_and_qwen_image():
    schnell, qwen = parameters("flux-schnell"), parameters("qwen-image")
    embedder = 256 * 3072 + 3072 + 3072**2 + 3072  # of the guidance scale
    assert (
        schnell["transformer"] == 11_901_408_320 - embedder
        and qwen["transformer"] == 20_430_401_088
    )
    assert qwen["text_encoder"] == 8_292_166_656, "as the hub says of Qwen2.5-VL-7B"


@pytest.mark.parametrize("card", ["z-image", "z-image-turbo"])
def test_the_cards_of_z_image(card):
    """Its authors say 6 B; the published bfloat16 weights are 12.3 GB, those of the text encoder
    8.05 GB."""
    counted = parameters(card)
    assert counted == {
        "transformer": 6_154_908_736,
        "text_encoder": 4_022_468_096,
        "vae": 83_819_683,
    }
    assert [round(2 * counted[part] / 1e9, 2) for part in ("transformer", "text_encoder")] == [
        12.31,
        8.04,
    ]


def test_the_cards_of_editing_models():
    """The models that they were finetuned from, to the last parameter."""
    assert parameters("flux-kontext") == parameters("flux-dev")
    assert (
        parameters("qwen-image-edit-2511")
        == parameters("qwen-image-edit")
        == parameters("qwen-image")
    )


def test_the_cards_of_wan():
    """Counts that public code asserts of the checkpoints that it has loaded."""
    others = {"vae": 126_892_531, "text_encoder": 5_680_910_336}
    assert parameters("wan21-1b") == {"transformer": 1_418_996_800, **others}
    assert parameters("wan22-a14b") == {
        "transformer": 14_288_491_584,
        "transformer_2": 14_288_491_584,
        **others,
    }
    assert parameters("wan21-14b") == {"transformer": 14_288_491_584, **others}


@pytest.mark.slow
@pytest.mark.parametrize("name, most", [("sd35_lora", 24), ("qwen_image_lora", 80)])
def test_shipped_guided_configs_fit_their_cards(name, most):
    """Qwen-Image does because its base is held once."""
    file = ROOT / f"configs/{name}.json"
    assert estimate(load_config(file), card_gb=most).fits
    assert estimate(load_config(file, ["model.share_base=false"]), card_gb=most).fits == (
        name == "sd35_lora"
    )


@pytest.mark.slow
def test_two_experts_take_what_the_page_says():
    """On one card with the base held once, and in slices without a rollout copy."""
    file, page = ROOT / "configs/wan22_a14b_lora.json", (ROOT / "docs/configs.md").read_text()
    sliced = load_config(file, ["deepspeed.zero_optimization.stage=3", "rollout.replica=false"])
    one, each = estimate(load_config(file)), estimate(sliced, gpus=8)
    assert one.fits and one.total > 4 * each.total
    for found in (one, each):
        assert f"({found.total / 1e9:.1f} GB" in page


def test_an_hour_of_the_first_run_on_flux():
    """The page's numbers are the dry run's; ten evaluations, and minutes left to load the model."""
    spec = importlib.util.spec_from_file_location(
        "make_configs_page", ROOT / "docs/make_configs_page.py"
    )
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    said, config = page.FIRST, load_config(ROOT / "configs/flux_first.json")
    result = estimate(config, mfu=said["mfu"])
    assert result.fits and result.total / 1e9 == pytest.approx(said["gb"], abs=0.06)
    assert result.speed / 1e12 == pytest.approx(said["tflops"], abs=0.5)
    seconds = {phase.name: phase.seconds for phase in result.phases}
    assert seconds == pytest.approx({name: said[name] for name in seconds}, abs=0.06)
    rollout = result.phase("rollout")
    assert (rollout.forwards, rollout.flops / 1e12) == (
        said["forwards"],
        pytest.approx(said["tflop"], abs=0.06),
    )
    iterations, evaluation = config.training.iterations, seconds.pop("evaluation")
    evaluations = 1 + -(-iterations // config.eval.every)
    assert (
        evaluations == 10
        and iterations * sum(seconds.values()) + evaluations * evaluation < 55 * 60
    )


def test_shipped_flux_configs_fit_their_cards(flux):
    """As docs/scaling.md says."""
    lora, zero3 = items(flux["lora"]), items(flux["zero3"])
    assert flux["lora"].fits and flux["zero3"].fits
    assert (
        zero3["rollout copy"] == 2 * 11_901_408_320
        and lora["rollout copy"] == 2 * flux["lora"].trained
    )
    assert zero3["parameters"] + zero3["gradients"] + zero3["optimizer"] == pytest.approx(
        18 * 11_901_408_320 / 8, rel=1e-3
    )
    assert zero3["average"] == 4 * 11_901_408_320 / 8 and "reference copy" not in zero3
    assert (
        flux["lora"].phase("rollout").forwards == 48 * (10 + 6 * 45)
        and flux["lora"].phase("training").forwards == 48 * 9
    )
    assert flux["zero3"].phase("rollout").busiest * 8 == flux["zero3"].phase("rollout").forwards


@pytest.mark.slow
def test_flux_lora_on_a_card_of_48_gb():
    """At 1024 px, with the base held once; the config differs from that of a larger card in how
    many rows go at a time."""
    small, large = (
        load_config(ROOT / f"configs/{name}.json") for name in ("flux_lora_48gb", "flux_lora")
    )
    result = estimate(small, card_gb=48)
    assert (
        result.fits
        and result.total < 40e9
        and (small.rollout.height, small.rollout.width) == (1024, 1024)
    )
    assert items(result)["rollout copy"] == 2 * result.trained < 1e9
    changed = small.model_copy(deep=True)
    changed.training.micro_batch, changed.rollout.decode_batch = (
        large.training.micro_batch,
        large.rollout.decode_batch,
    )
    changed.logging.name = large.logging.name
    assert changed == large


def test_operations_of_a_forward(flux):
    """Twice the weights for every token that passes them, and attention's two products, to within
    what is left out here."""
    tokens, width, layers = 4096 + 512, 3072, 19 + 38
    # a single block's weights that see every token; a double block's are two sets, one a token
    blocks = 38 * 12 * width**2
    blocks += 19 * 12 * width**2
    by_hand = 2 * tokens * blocks + layers * 4 * tokens**2 * width
    assert flux["lora"].phase("rollout").flops == pytest.approx(by_hand, rel=0.01)
    backward = flux["zero3"].phase("training").flops / flux["zero3"].phase("rollout").flops
    assert 4 < backward < 4.2, (
        "twice a forward, and the forward again for checkpointing; attention's backward recomputes"
        " scores"
    )


def test_what_does_not_fit_is_said():
    """All weights on one GPU: its largest parts, with the keys that decide them."""
    result = estimate(
        load_config(ROOT / "configs/flux_zero3.json", ["data.prompts_per_iteration=1"])
    )
    text = " ".join(
        printed(result).split("Largest items:")[1].split("Change these keys")[0].split()
    )
    largest = sorted(result.memory.resident, key=lambda item: -item.bytes)[:3]
    assert not result.fits and [text.index(item.name) for item in largest] == sorted(
        text.index(item.name) for item in largest
    )
    assert (
        "142.8 GB training engine: optimizer: model.lora, zero_optimization.stage,"
        " offload_optimizer" in text
    )
    assert "training: activations of" in text, "the largest of the moments"


def test_text_encoders_leave_where_embeddings_are_cached():
    """From every GPU, and from the host before the rest is loaded."""
    stay, gone = (
        estimate(small_config(data={"embedding_cache": cache}), card_gb=0.001)
        for cache in (None, "elsewhere")
    )
    encoders, rest = items(stay)["text encoders"], items(stay)["VAE"] + items(stay)["rollout copy"]
    assert "text encoders" not in items(gone) and stay.total - gone.total == encoders > 0
    assert stay.memory.start == encoders + rest and gone.memory.start == max(encoders, rest)


def test_a_graph_keeps_what_a_forward_holds():
    """All along, beside the eager forward that it is compared with; without it that much is
    free."""
    plain, graphs = (
        estimate(small_config(rollout={"graphs": value}), card_gb=0.001) for value in (False, True)
    )
    forward = next(
        item.bytes for item in plain.memory.moments if item.name.startswith("rollout: a forward")
    )
    assert graphs.total - plain.total == items(graphs)["CUDA graph of the rollout"] == forward > 0
    assert "CUDA graph of the rollout" not in items(plain)


def test_a_penalty_keeps_a_reference():
    """The copy, and its velocity at every state."""
    plain, penalised = (
        estimate(small_config(training={"penalty": penalty})) for penalty in (None, {"coef": 0.1})
    )
    reference = items(penalised)["reference copy"]
    assert (
        reference == items(penalised)["parameters"]
        and penalised.total - plain.total == reference + 12 * 48 * 32 * 4
    )


# stage, more of the section, bytes per trained weight on one of four GPUs: parameters, gradients,
# optimizer
ZERO = [
    (1, {"data_types": {"grad_accum_dtype": "fp32"}}, 2, 4, 12 / 4),
    (1, {}, 2, 2 + 2 / 4, 12 / 4),
    (2, {}, 2, 2 / 4, 12 / 4),
    (3, {}, 2 / 4, 2 / 4, 12 / 4),
    (3, {"data_types": {"grad_accum_dtype": "fp32"}}, 2 / 4, 4 / 4, 12 / 4),
]


@pytest.mark.parametrize("stage, more, parameters, gradients, optimizer", ZERO)
def test_zero_stages(stage, more, parameters, gradients, optimizer):
    result = estimate(
        small_config(deepspeed={**BF16, **more, "zero_optimization": {"stage": stage}}), gpus=4
    )
    seen, count = items(result), result.trained
    assert [
        seen["parameters"] / count,
        seen["gradients"] / count,
        seen["optimizer"] / count,
    ] == pytest.approx([parameters, gradients, optimizer], rel=1e-4)


def test_where_the_reference_is():
    """Bytes of the copy on one of four GPUs, and in host memory."""

    def of(stage, reference=None):
        deepspeed = {**BF16, "zero_optimization": {"stage": stage}}
        memory = estimate(
            small_config(
                training={"penalty": {"coef": 0.01}, "reference": reference}, deepspeed=deepspeed
            ),
            gpus=4,
        ).memory
        return [
            sum(i.bytes for i in part if i.name.startswith("reference copy"))
            for part in (memory.resident, memory.host)
        ]

    whole = of(2)[0]
    assert of(2) == of(3, "whole") == of(2, "whole") == [whole, 0] and whole > 0
    assert of(3) == of(3, "sharded") == of(2, "sharded") == [whole / 4, 0]
    assert of(3, "offloaded") == [0, whole / 4]


def test_offloading_moves_bytes_to_the_host():
    ds = {**BF16, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    here, there = (
        estimate(small_config(deepspeed=section), gpus=2)
        for section in ({**BF16, "zero_optimization": {"stage": 2}}, ds)
    )
    assert (
        "optimizer" not in items(there)
        and items(there)["offloaded by DeepSpeed"] >= items(here)["optimizer"]
    )


# ------------------------------------------------------------------------------------------ command
def printed(result) -> str:
    out = io.StringIO()
    show(result, Console(file=out, width=140))
    return out.getvalue()


def test_dry_run_loads_and_writes_nothing(tmp_path, skeleton):
    """A folder without weights will do."""
    file = write_config(
        tmp_path, model={"path": str(skeleton)}, logging={"dir": str(tmp_path / "runs")}
    )
    done = script_here("train", "--config", file, "--dry-run", "--gpus", 2)
    assert done.returncode == 0, done.stderr
    assert all(
        word in done.stdout
        for word in (
            "2 GPUs of 80.0 GB",
            "rollout copy",
            "Fits",
            "training (with backward)",
            "Host memory",
        )
    )
    assert not (tmp_path / "runs").exists()


def test_dry_run_says_that_it_does_not_fit(tmp_path):
    done = script_here("train", "--config", write_config(tmp_path), "--dry-run", "--card-gb", 0.02)
    assert done.returncode == 0, done.stderr
    assert "Does not fit" in done.stdout and "Largest items:" in done.stdout


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
            [
                "--set",
                "model.path=stabilityai/stable-diffusion-3.5-large",
                "--set",
                "rollout.height=3088",
            ],
            ["rollout.height", "3088 x 96", "at most 3072 pixels on each side"],
        ),
        (["--set", 'model.lora={"targets": ["nothing"]}'], ["model.lora", "nothing"]),
        (
            ["--set", 'deepspeed.zero_optimization={"stage": 2, "reduce_bucket_size": "big"}'],
            ["reduce_bucket_size", "'big'"],
        ),
    ],
)
def test_dry_run_refuses(tmp_path, arguments, words):
    done = script_here("train", "--config", write_config(tmp_path), "--dry-run", *arguments)
    assert (
        done.returncode == 2 and done.stdout == "" and all(word in done.stderr for word in words)
    ), done.stdout + done.stderr


@pytest.mark.parametrize("option", [("--card-gb", 24), ("--gpus", 2), ("--mfu", 0.5)])
def test_its_options_do_not_start_a_run(tmp_path, option):
    done = script_here("train", "--config", write_config(tmp_path), *option)
    assert done.returncode == 2 and f"{option[0]}: needs --dry-run" in done.stderr
    assert not (tmp_path / "runs").exists()


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
    config = small_config(
        data={"prompts_per_iteration": most},
        rollout={"plan": {"seeds": most}},
        training={"updates": {"passes": most}},
    )
    result = estimate(config)
    assert not result.fits and printed(dataclasses.replace(result)) and config_table()
