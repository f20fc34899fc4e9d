"""What the neural rewards refuse, and the conversion of published weights."""

import pytest
import torch
from reward_helpers import refused
from reward_models import (
    clip_config,
    loaded,
)
from safetensors.torch import load_file, save_file

from tempflow.errors import UserError
from tempflow.rewards import build_reward
from tempflow.rewards.neural import convert
from tempflow.rewards.workers import rank_gpu


@pytest.mark.parametrize(
    "visible, rank, expected",
    [(None, None, "0"), (None, "3", "3"), ("4,7", "1", "7"), ("", "0", ""), ("2", "1", "")],
)
def test_gpu_of_a_rank(monkeypatch, visible, rank, expected):
    for key, value in (("CUDA_VISIBLE_DEVICES", visible), ("LOCAL_RANK", rank)):
        (
            monkeypatch.setenv(key, value)
            if value is not None
            else monkeypatch.delenv(key, raising=False)
        )
    assert rank_gpu() == expected


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("pickscore", {"device": "gpu"}, ["rewards.pickscore.device", '"cpu" or "cuda"', "'gpu'"]),
        ("hpsv3", {"dtype": "fp8"}, ["rewards.hpsv3.dtype", "float32, bfloat16, float16", "'fp8'"]),
        ("aesthetic", {"batch_size": 0}, ["rewards.aesthetic.batch_size", "1 or more", "0"]),
        ("clipscore", {"base": "x"}, ["rewards.clipscore.base", "prefix"]),
    ],
)
def test_options_refused(name, options, words):
    with refused(words):
        build_reward(name, options)


def spoil(models, folder, fault):
    """A copy of the CLIP folder with one thing wrong."""
    import shutil

    shutil.copytree(models["folders"]["clip"], folder, dirs_exist_ok=True)
    (folder / "head.safetensors").unlink()
    weights = folder / "model.safetensors"
    if fault == "pickle":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "tensor missing":
        tensors = load_file(weights)
        del tensors["visual_projection.weight"]
        save_file(tensors, weights)
    elif fault == "other model":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    elif fault == "other shapes":
        clip_config(hidden_size=16).save_pretrained(folder)
    elif fault == "two files":
        weights.rename(folder / "a.safetensors")
        shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    else:
        (folder / fault).unlink()


@pytest.mark.parametrize(
    "fault, words",
    [
        ("config.json", ["config.json", "No such file"]),
        ("model.safetensors", ["holds no .safetensors"]),
        ("preprocessor_config.json", ["image processor"]),
        ("pickle", ["pytorch_model.bin", "python -m tempflow.rewards.neural.convert"]),
        ("truncated", ["model.safetensors cannot be read"]),
        (
            "tensor missing",
            ["1 tensors of CLIPModel are missing, such as visual_projection.weight"],
        ),
        ("other model", ["model_type 'bert'", "expected 'clip'"]),
        ("other shapes", ["do not fit CLIPModel"]),
        ("two files", ["several weight files, a.safetensors, b.safetensors"]),
    ],
)
def test_folder_refused(models, tmp_path, fault, words):
    spoil(models, tmp_path, fault)
    with refused(["rewards.pickscore.path", *words]):
        loaded(models, "pickscore", path=str(tmp_path))


@pytest.mark.parametrize(
    "name, options, words",
    [
        (
            "pickscore",
            {"path": "no/such/folder"},
            ["rewards.pickscore.path", "'no/such/folder' is neither a folder on this machine"],
        ),
        ("pickscore", {"revision": "v2"}, ["rewards.pickscore.path", "'v2'"]),
        ("hpsv2", {"path": "{imagereward}"}, ["rewards.hpsv2.path", "visual.conv1.weight"]),
        ("hpsv2", {"base": "{qwen}"}, ["rewards.hpsv2.base", "'qwen2_vl'"]),
        ("aesthetic", {"head": "{clip}"}, ["rewards.aesthetic.head", "no linear layers"]),
        (
            "aesthetic",
            {"head": "{imagereward}"},
            ["rewards.aesthetic.head", "takes embeddings of width 40", "have 24"],
        ),
        ("imagereward", {"path": "{clip}"}, ["rewards.imagereward.path", "'clip'"]),
        (
            "imagereward",
            {"path": "{clip}/model.safetensors"},
            ["rewards.imagereward.path", "no linear layers"],
        ),
        ("hpsv3", {"path": "{clip}/model.safetensors"}, ["rewards.hpsv3.path", "rm_head.0.weight"]),
        ("hpsv3", {"base": "{clip}"}, ["rewards.hpsv3.base", "'qwen2_vl'"]),
    ],
)
def test_source_refused(models, monkeypatch, name, options, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folders = {key: str(folder) for key, folder in models["folders"].items()}
    with refused(words):
        loaded(models, name, **{key: value.format(**folders) for key, value in options.items()})


def test_hpsv3_refuses_control_tokens():
    with pytest.raises(UserError, match=r"a.txt:3: .*<\|image_pad\|>"):
        build_reward("hpsv3").check_prompts(["a cat", "<|image_pad|>"], [{}, {"source": "a.txt:3"}])


@pytest.mark.parametrize("wrapped", [False, True])
def test_convert(tmp_path, wrapped, capsys):
    tensors = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "a.bias": torch.ones(2, dtype=torch.bfloat16),
    }
    tensors["transposed"] = tensors["a.weight"].T
    torch.save({"state_dict": tensors, "epoch": 3} if wrapped else tensors, tmp_path / "in.pth")
    assert convert.main([str(tmp_path / "in.pth"), str(tmp_path / "out.safetensors")]) == 0
    result = load_file(tmp_path / "out.safetensors")
    assert result.keys() == tensors.keys() and all(
        torch.equal(result[name], tensors[name]) for name in tensors
    )
    assert "3 tensors" in capsys.readouterr().out


class Mine:
    """Something only a full unpickler builds."""


@pytest.mark.parametrize(
    "content, words",
    [
        (Mine(), "cannot be read as a checkpoint of plain tensors"),
        ([1, 2], "no dictionary of tensors"),
    ],
)
def test_convert_refuses(tmp_path, capsys, content, words):
    torch.save(content, tmp_path / "in.pt")
    assert convert.main([str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()
