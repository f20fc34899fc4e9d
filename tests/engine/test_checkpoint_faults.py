"""Model folders with one thing wrong: one message names the component and what to do; what is
whole, if unusual, is loaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_faults import HELD, SHOWN, WHOLE, config_of, content_of, edit_tensors, tensor_file
from engine_cases import MODEL, write_config
from run_cases import script_here

from tempflow.errors import UserError
from tempflow.models import check_checkpoint, check_model, family_of, load_denoiser, load_policy
from tempflow.models import hub as hub_files
from tempflow.models.checking import check_module, components_of
from tempflow.models.component import Component, first_not_finite, is_finite, skeleton
from tempflow.models.hub import CARDS

LENGTH = 20


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert message.startswith("model.path: ") and len(message) < 700 and "\n" not in message, (
        message
    )
    return message


@pytest.mark.parametrize("edit, words", SHOWN.values(), ids=SHOWN)
def test_seen_before_anything_is_loaded(folder, monkeypatch, edit, words):
    """And the same message from load_policy, which loads nothing before it."""
    edit(folder)
    message = refusal(check_checkpoint, folder)
    assert all(word in message for word in words), message
    monkeypatch.setattr(Component, "load", lambda *args: pytest.fail("loaded"))
    assert refusal(load_policy, folder) == message


@pytest.mark.parametrize("edit, words", HELD.values(), ids=HELD)
def test_seen_while_loading(folder, edit, words):
    edit(folder)
    check_checkpoint(folder)
    message = refusal(load_policy, folder)
    assert all(word in message for word in words), message
    if words[0] == "transformer":
        assert refusal(load_denoiser, str(folder), torch.float32) == message


@pytest.mark.parametrize("edit", WHOLE.values(), ids=WHOLE)
def test_what_is_whole_is_loaded(folder, policy, edit):
    edit(folder)
    check_checkpoint(folder)
    loaded = load_policy(folder, max_sequence_length=LENGTH)
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        expected = getattr(policy.pipe, part).state_dict()
        held = getattr(loaded.pipe, part).state_dict()
        assert held.keys() == expected.keys() and all(
            torch.equal(held[name], expected[name]) for name in held
        ), part


def test_tensors_that_are_left_out_are_told(folder, capsys):
    """As of a config with fewer layers than the file: diffusers loads the rest."""
    config_of("transformer/config.json", num_layers=1)(folder)
    load_policy(folder, max_sequence_length=LENGTH)
    told = capsys.readouterr().err
    assert (
        told.startswith("note: model.path: transformer: ignored transformer_blocks.1.")
        and "more, which" in told
    )


@pytest.mark.parametrize(
    "index", ["[]", "7", "null", "{}", '{"_class_name": null}', '{"_class_name": ["FluxPipeline"]}']
)
def test_an_index_without_a_pipeline(folder, index):
    (folder / "model_index.json").write_text(index)
    assert "model_index.json is damaged: it names no _class_name" in refusal(check_model, folder)


@pytest.mark.parametrize("part", ["tokenizer_2", "text_encoder", "vae"])
def test_a_folder_that_may_not_be_listed(folder, monkeypatch, part):
    """As an operating system refuses it to others than root."""

    def listing(self):
        if self.name == part:
            raise PermissionError(13, "Permission denied", str(self))
        return iterate(self)

    iterate = Path.iterdir
    tensor_file(folder, part).unlink(missing_ok=True)
    (folder / part / "tokenizer.json").unlink(missing_ok=True)
    monkeypatch.setattr(Path, "iterdir", listing)
    assert f"{part} cannot be read: Permission denied" in refusal(check_checkpoint, folder)


def test_every_missing_tensor_is_missed(folder):
    """Whichever it is, of the whole model: one after the other by its header, with the rest in
    place."""
    for component in components_of(folder, family_of(str(folder))):
        if not component.is_module:
            continue
        whole = dict(component.shapes)
        for name in list(whole)[:: max(1, len(whole) // 12)]:
            component.__dict__["shapes"] = {
                other: shape for other, shape in whole.items() if other != name
            }
            assert f"lacks {name}" in refusal(check_module, component).replace(
                "encoder.embed_tokens.weight, ", ""
            ), name


REAL = {  # published models: names in their files by the names of today's classes
    "flux-dev/text_encoder": lambda name: f"text_model.{name}",
    "flux-dev/text_encoder_2": lambda name: name,
    "sd35-medium/text_encoder": lambda name: (
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
    ),
    "qwen-image/text_encoder": (
        lambda name: name.replace("model.language_model.", "model.").replace(
            "model.visual.", "visual."
        )
    ),
    "flux-dev/transformer": lambda name: name,
    "sd35-medium/transformer": lambda name: name,
    "qwen-image/transformer": lambda name: name,
    "flux-dev/vae": lambda name: name,
    "qwen-image/vae": lambda name: name,
    "wan21-1b/text_encoder": lambda name: name,
    "wan21-1b/transformer": lambda name: name,
    "wan21-1b/vae": lambda name: name,
    "z-image/text_encoder": lambda name: f"model.{name}",
    "z-image/transformer": lambda name: name,
}


@pytest.mark.parametrize("place", REAL)
def test_published_models_are_whole(place):
    """From their configs, in the layout of the files on the hub; and a tensor less is missed."""
    card, part = place.split("/")
    index = json.loads((CARDS / card / "model_index.json").read_text())
    component = Component(CARDS / card, part, *index[part])
    module = skeleton(component.library, component.kind, component.config, part)
    names = {name for name, _ in module.named_parameters()}
    shapes = {
        REAL[place](name): ("BF16", tuple(tensor.shape))
        for name, tensor in module.state_dict().items()
        if name in names
    }
    component.__dict__.update(shapes=shapes, files=[Path("model.safetensors")])
    check_module(component)
    gone = sorted(name for name in shapes if "q_proj" in name or ".q." in name or "to_q" in name)[0]
    component.__dict__["shapes"] = {name: shape for name, shape in shapes.items() if name != gone}
    assert "lacks" in refusal(check_module, component)


def test_a_description_has_no_weights_to_check():
    """A card is for the dry run; for training there is nothing to load."""
    card = CARDS / "flux-schnell"
    check_checkpoint(card, description=True)
    assert "text_encoder" in refusal(check_checkpoint, card)


@pytest.mark.parametrize(
    "case", ["half a transformer", "Heun", "NF4", "an emptied tokenizer", "CLIP lacks a weight"]
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_train_says_the_same(folder, tmp_path, case, more):
    edit, words = SHOWN[case]
    edit(folder)
    config = write_config(
        tmp_path, model={"path": str(folder)}, logging={"dir": str(tmp_path / "runs")}
    )
    done = script_here("train", "--config", config, *more)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"error: {refusal(check_checkpoint, folder)}"
    assert not (tmp_path / "runs").exists()


def test_half_precision_that_overflows_is_named(folder):
    edit_tensors(
        folder,
        "vae",
        lambda tensors: {
            name: w * 1e9 if "conv_out.weight" in name else w for name, w in tensors.items()
        },
    )
    assert "too large for float16" in refusal(load_policy, folder, dtype="float16")


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn],
    ids=str,
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_among_many(dtype, value):
    if dtype == torch.float8_e4m3fn and value != value:
        return
    for size in (1, 63, 1000):
        tensor = torch.linspace(-1, 1, size).to(dtype)
        assert is_finite(tensor)
        if dtype != torch.float8_e4m3fn:  # it has no infinity
            tensor[size // 2] = value
            assert not is_finite(tensor)
    assert is_finite(torch.empty(0, dtype=dtype)) and is_finite(torch.arange(3))


def test_masks_that_are_not_weights_may_be_infinite():
    """Buffers that are not saved, as some attention masks are."""
    module = torch.nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2,), float("-inf")), persistent=False)
    assert first_not_finite(module) is None
    module.register_buffer("mean", torch.full((2,), float("-inf")))
    assert first_not_finite(module) == "mean"


# -------------------------------------------------------------------------------- paths and the hub
PATHS = {
    "one file": (
        "{tmp}/flux1-dev.safetensors",
        ["checkpoint in one file", "from_single_file", "save_pretrained"],
    ),
    "quantized file": ("{tmp}/flux.gguf", ["one file, and quantized"]),
    "one file that is not there": (
        "models/flux1-dev.safetensors",
        ["models/flux1-dev.safetensors does not exist"],
    ),
    "the index": ("{tmp}/model/model_index.json", ["name its folder, {tmp}/model"]),
    "a component": ("{tmp}/model/transformer", ["one component of a pipeline"]),
    "a run": ("{tmp}/run", ["is a run directory", "engine/export.py"]),
    "adapters": ("{tmp}/lora", ["LoRA adapters", "model.lora.start"]),
    "any folder": ("{tmp}", ["has no model_index.json"]),
    "a text": ("{tmp}/notes.txt", ["is a file; a folder with model_index.json"]),
    "too long": ("x" * 5000, ["too long"]),
    "no hub id": ("own er/name", ["hub id has the form owner/name"]),
    "no hub id either": ("owner/a..b", ["hub id has the form owner/name"]),
    "not on this machine": ("owner/name", ["no folder owner/name", "HF_HUB_OFFLINE"]),
}


@pytest.mark.parametrize("path, words", PATHS.values(), ids=PATHS)
def test_paths_that_are_no_pipeline(folder, tmp_path, path, words):
    for name in ("flux1-dev.safetensors", "flux.gguf", "notes.txt"):
        (tmp_path / name).write_bytes(bytes(64))
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").touch()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").touch()
    message = refusal(check_model, path.format(tmp=tmp_path))
    assert all(word.format(tmp=tmp_path) in message for word in words), message


def test_what_the_hub_says_is_passed_on():
    from huggingface_hub import errors

    def fault(kind):
        return hub_files.hub_fault("owner/name", "model_index.json", kind.__new__(kind))

    assert "accept its conditions" in fault(errors.GatedRepoError)
    assert "no such model on the hub" in fault(errors.RepositoryNotFoundError)
    assert "not a diffusers pipeline" in fault(errors.RemoteEntryNotFoundError)
    for kind in (errors.LocalEntryNotFoundError, OSError, ImportError):
        assert re.search("cannot be fetched .*HTTPS_PROXY", fault(kind))


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    """Not six times over half a minute, as downloads do; one that answers is left to the
    download."""
    import huggingface_hub as hub

    def ask(error):
        monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url: (_ for _ in ()).throw(error))
        return refusal(check_model, "owner/name")

    monkeypatch.setattr(hub, "hf_hub_download", lambda *args: pytest.fail("asked again"))
    assert "ConnectionError: no route" in ask(ConnectionError("no route"))
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda *args: (_ for _ in ()).throw(OSError("after six tries"))
    )
    busy = hub.errors.HfHubHTTPError.__new__(hub.errors.HfHubHTTPError)
    assert "after six tries" in ask(busy)


def test_a_model_of_the_hub_is_checked_where_it_was_downloaded(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    commit = "a" * 40
    home = tmp_path / "hub/models--owner--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    downloaded = Path(shutil.move(folder, home / "snapshots" / commit))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert (
        load_policy("owner/tiny", max_sequence_length=LENGTH, parts="text").pipe.transformer is None
    )
    assert isinstance(load_denoiser("owner/tiny", torch.bfloat16), torch.nn.Module)
    content_of("vae", lambda data: data[:1000])(downloaded)
    assert str(tensor_file(downloaded, "vae")) in refusal(load_policy, "owner/tiny")
