"""Adapters that others saved as the start of a run: the same velocities in each layout, and
refusals that say why."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_cases import examples, randomise
from kernel_cases import assert_close
from safetensors.torch import load_file, save_file

from tempflow.config import Lora
from tempflow.errors import UserError
from tempflow.models import load_policy
from tempflow.models.lora import read_adapters
from tempflow.training.engine import add_lora
from tempflow.types import Size

RANK, ALPHA = 3, 5.0


@pytest.fixture(scope="module")
def plain(pipelines):
    return load_policy(pipelines["plain"], max_sequence_length=20)


def adapted(policy, **lora):
    module = copy.deepcopy(policy.transformer)
    add_lora(module, Lora(**{"rank": RANK, "alpha": ALPHA, **lora}), policy.lora_targets, seed=0)
    return module


def velocity(policy, module):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *policy.latent_shape(Size(32, 48)), generator=generator)
    conditioning = policy.encode(examples(["a cat", "two dogs"]))
    with torch.no_grad():
        return policy.velocity(module, x, torch.tensor([0.9, 0.3]), conditioning, Size(32, 48), 0.0)


def state(module):
    return {
        name.replace(".default.", "."): p.detach().clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


@pytest.fixture(scope="module")
def trained(plain):
    """A transformer whose adapters have learned something."""
    module = adapted(plain, targets=["to_q", "to_out.0", "proj_mlp"])
    for n, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
        randomise(torch.nn.ParameterList([parameter]), n)
    return module


@pytest.fixture(scope="module")
def saved(plain, trained, tmp_path_factory):
    """The same adapters as peft, diffusers and our own export write them."""
    from diffusers import FluxPipeline
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("adapters")
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_out.0", "proj_mlp"])
    peft = get_peft_model(copy.deepcopy(plain.transformer), settings)
    named = {
        f"base_model.model.{name.replace('.weight', '.default.weight')}": w
        for name, w in state(trained).items()
    }
    assert not peft.load_state_dict(named, strict=False).unexpected_keys
    peft.save_pretrained(root / "peft")
    FluxPipeline.save_lora_weights(
        root / "diffusers",
        transformer_lora_layers=state(trained),
        transformer_lora_adapter_metadata=settings.to_dict(),
    )
    return root


@pytest.mark.parametrize(
    "start", ["peft", "diffusers", "diffusers/pytorch_lora_weights.safetensors"]
)
def test_the_start_is_the_saved_policy(plain, trained, saved, start):
    """Targets are the file's own, since none are named."""
    module = adapted(plain, start=str(saved / start))
    expected = velocity(plain, trained)
    assert torch.equal(velocity(plain, module), expected)
    assert (expected - velocity(plain, plain.transformer)).norm() > 0.01 * expected.norm(), (
        "the adapters matter"
    )


def test_diffusers_gives_the_same(plain, saved, pipelines):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(pipelines["plain"])
    pipe.load_lora_weights(saved / "diffusers")
    module = adapted(plain, start=str(saved / "diffusers"))
    assert_close("velocity", velocity(plain, pipe.transformer), velocity(plain, module), rel=1e-6)


def test_without_settings_the_scale_is_one(plain, trained, saved, tmp_path):
    file = tmp_path / "adapters.safetensors"
    save_file(load_file(saved / "diffusers/pytorch_lora_weights.safetensors"), file)
    with pytest.raises(UserError, match="model.lora.alpha: 5, but .* has 3"):
        read_adapters(Lora(rank=RANK, alpha=ALPHA, start=str(file)))
    assert (
        read_adapters(Lora(rank=RANK, alpha=RANK, start=str(file))).keys() == state(trained).keys()
    )


@pytest.mark.parametrize(
    "lora, words",
    [
        ({"rank": 4}, "model.lora.rank: 4, but .* has rank 3"),
        ({"alpha": 6.0}, "model.lora.alpha: 6, but .* has 5"),
        ({"targets": ["to_q", "to_out.0"]}, "adapts a layer that the run does not: .*proj_mlp"),
        (
            {"targets": ["to_q", "to_k", "to_out.0", "proj_mlp"]},
            "lacks an adapter that the run has: .*to_k",
        ),
    ],
)
def test_another_run_is_refused(plain, saved, lora, words):
    with pytest.raises(UserError, match=words):
        adapted(plain, start=str(saved / "peft"), **lora)


def test_another_model_is_refused(plain, saved, pipelines, tmp_path):
    weights = load_file(saved / "diffusers/pytorch_lora_weights.safetensors")
    cases = [
        (
            {name.replace("to_q", "to_z"): w for name, w in weights.items()},
            "no layer of the transformer is named .*to_z",
        ),
        (
            {name: w[:, :-1] if "lora_A" in name else w for name, w in weights.items()},
            "trained for another model",
        ),
    ]
    for tensors, words in cases:
        save_file(
            {name: w.contiguous() for name, w in tensors.items()}, tmp_path / "other.safetensors"
        )
        with pytest.raises(UserError, match=f"model.lora.start: .*{words}"):
            adapted(plain, alpha=RANK, start=str(tmp_path / "other.safetensors"))


def test_files_that_are_no_adapters(saved, tmp_path):
    def refused(words, file=tmp_path):
        with pytest.raises(UserError, match=f"model.lora.start: .*{words}"):
            read_adapters(Lora(rank=RANK, alpha=ALPHA, start=str(file)))

    refused("expected a .safetensors file", tmp_path / "nothing")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    refused("pickle files are not read")
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"nonsense")
    refused("is damaged")
    save_file({}, file)
    refused("holds no adapter")
    save_file({"lora_unet_double_blocks_0.lora_down.weight": torch.zeros(3, 4)}, file)
    refused("not a transformer adapter")
    save_file(load_file(saved / "peft/adapter_model.safetensors"), file)
    settings = json.loads((saved / "peft/adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    refused("use_dora")
    save_file({}, tmp_path / "pytorch_lora_weights.safetensors")
    refused("holds pytorch_lora_weights.safetensors and adapter_model.safetensors")


# ----------------------------------------------------------------------- how the adapters were made
TARGETS = ["to_q", "to_out.0", "proj_mlp"]


def made_by_peft(plain, folder, **settings):
    """Adapters that peft made and trained a little, and their velocities in peft on the base that
    it was given."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(copy.deepcopy(plain.transformer), config)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return velocity(plain, PeftModel.from_pretrained(copy.deepcopy(plain.transformer), folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"lora_dropout": 0.3, "exclude_modules": ["x"]},
        {"layers_to_transform": [0], "layers_pattern": "single_transformer_blocks"},
        {"rank_pattern": {"to_q": RANK}},
        {"qalora_group_size": 8},
        {"fan_in_fan_out": True},
    ],
    ids=str,
)
def test_what_peft_computes_otherwise_or_not_at_all_is_the_same_policy(plain, tmp_path, settings):
    expected = made_by_peft(plain, tmp_path, **settings)
    module = adapted(plain, start=str(tmp_path), rank=settings.get("r", RANK))
    assert_close("velocity", velocity(plain, module), expected, rel=1e-5)


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights 'pissa'.*path_initial_model_for_weight_conversion",
        ),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights 'pissa_niter_2'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "DoRA|use_dora"),
        ({"lora_bias": True, "init_lora_weights": True}, "lora_B.bias|lora_bias"),
        ({"alpha_pattern": {"to_q": 1.0}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias"),
        ({"rank_pattern": {"to_q": 5}}, "different ranks \\(3 in .*; 5 in .*to_q\\)"),
    ],
    ids=str,
)
def test_other_kinds_of_peft_are_refused(plain, tmp_path, settings, words):
    made_by_peft(plain, tmp_path, **settings)
    with pytest.raises(UserError, match=f"model.lora.start: .*({words})"):
        read_adapters(Lora(rank=RANK, alpha=ALPHA, start=str(tmp_path)))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": kind}
        for kind in (
            "corda",
            "loftq",
            "lora_ga",
            "mica",
            "PiSSA",
            "of_tomorrow",
            None,
            3,
            ["pissa"],
        )
    ]
    + [
        {"peft_type": "LOHA"},
        {"peft_type": None},
        {"use_tomorrow": True},
        {"kasa_config": {"beta": 1}},
        {"modules_to_save": ["x_embedder"]},
        {"layer_replication": [[0, 1]]},
        {"target_parameters": ["w"]},
        {"megatron_config": {"a": 1}},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_settings_that_are_not_known_to_be_plain_are_refused(saved, tmp_path, settings, layout):
    """Allowed by name, so that a kind that peft does not have yet is refused as well."""
    name = next(iter(settings))
    if layout == "peft":
        file = tmp_path / "adapter_model.safetensors"
        save_file(load_file(saved / "peft/adapter_model.safetensors"), file)
        config = json.loads((saved / "peft/adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | settings))
    else:
        file = tmp_path / "pytorch_lora_weights.safetensors"
        metadata = {
            f"transformer.{key}": value for key, value in {"lora_alpha": ALPHA, **settings}.items()
        }
        save_file(
            load_file(saved / "diffusers/pytorch_lora_weights.safetensors"),
            file,
            metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)},
        )
    with pytest.raises(UserError, match=f"model.lora.start: .*{name}"):
        read_adapters(Lora(rank=RANK, alpha=ALPHA, start=str(tmp_path)))


TENSORS = {
    "text encoder": (
        lambda w: {**w, "text_encoder.text_model.q.lora_A.weight": torch.zeros(3, 4)},
        "adapter of a text encoder",
    ),
    "kohya's": (
        lambda w: {**w, "lora_te1_text_model.lora_down.weight": torch.zeros(3, 4)},
        "adapter of a text encoder",
    ),
    "NaN": (lambda w: {name: t * float("nan") for name, t in w.items()}, "NaN"),
    "whole numbers": (lambda w: {name: t.to(torch.int8) for name, t in w.items()}, "whole numbers"),
    "convolution": (lambda w: {name: t[..., None, None] for name, t in w.items()}, "4 dimensions"),
    "half a pair": (
        lambda w: {name: t for name, t in w.items() if name != min(w)},
        "lora_B.weight without .*lora_A.weight",
    ),
    "two ranks": (
        lambda w: {
            name: t[:2] if "to_q.lora_A" in name else t[:, :2] if "to_q.lora_B" in name else t
            for name, t in w.items()
        },
        "different ranks",
    ),
    "halves of two ranks": (
        lambda w: {name: t[:2] if "to_q.lora_A" in name else t for name, t in w.items()},
        "different ranks",
    ),
}


@pytest.mark.parametrize("edit, words", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_no_adapters_of_the_transformer(saved, tmp_path, edit, words):
    weights = edit(load_file(saved / "diffusers/pytorch_lora_weights.safetensors"))
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match=f"model.lora.start: .*{words}"):
        read_adapters(Lora(rank=RANK, alpha=RANK, start=str(tmp_path)))


def test_files_that_may_not_be_read(saved, tmp_path, monkeypatch):
    """As an operating system refuses them to others than root; and settings that are no table, or a
    link to nothing."""

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    shutil.copytree(saved / "peft", tmp_path / "peft")
    settings, lora = (
        tmp_path / "peft/adapter_config.json",
        Lora(rank=RANK, alpha=RANK, start=str(tmp_path / "peft")),
    )
    for text in ("[1]", "[]", "7", "null", "[" * 100_000, '{"r": '):
        settings.write_text(text)
        with pytest.raises(UserError, match="model.lora.start: .*has unreadable settings"):
            read_adapters(lora)
    settings.unlink()
    settings.symlink_to(tmp_path / "nothing")
    with pytest.raises(
        UserError, match="model.lora.start: .*has unreadable settings: .*No such file"
    ):
        read_adapters(lora)
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(
        UserError, match="model.lora.start: .*peft' cannot be read: Permission denied"
    ):
        read_adapters(lora)


@pytest.mark.parametrize(
    "content, words",
    [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer")],
)
def test_files_that_were_not_downloaded(tmp_path, content, words):
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"model.lora.start: .*{words}"):
        read_adapters(Lora(rank=RANK, alpha=ALPHA, start=str(tmp_path)))
