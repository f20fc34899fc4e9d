"""Finds the files of a reward's model in a folder or on the hub, and builds transformers' models
from them, with checks.

Weights are read from safetensors only, because unpickling can run code. Other files of a repository
are neither downloaded nor opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, TypeVar, cast

import torch

from tempflow.errors import UserError

T = TypeVar("T")

_TEXTS = ["*.json", "*.txt"]  # configs, tokenizers, indices of weight files
# Not downloaded: subfolders have other formats, and open_clip* is a second copy of the weights.
_UNUSED = ["*/*", "open_clip*"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def fetch(key: str, path: str, revision: str = "main", *, weights: bool = True) -> Path:
    """Find a model, and download it if need be.

    Args:
        key: the option that names it, for error messages.
        path: a folder, a .safetensors file, or a hub repository.
        revision: branch, tag or commit of a hub repository.
        weights: False leaves the weights out of a download.

    Returns:
        The folder, or the file, on this machine.

    Raises:
        UserError: if there is no such folder, file or repository.
    """
    local = Path(path).expanduser()
    if local.exists():
        if revision != "main":
            raise UserError(
                f"{key}: {path} is a folder or file on this machine, which has no revision"
                f" {revision!r}; leave `revision` out"
            )
        return local
    from huggingface_hub import snapshot_download

    wanted = [*_TEXTS, "*.safetensors"] if weights else _TEXTS
    try:
        return Path(
            snapshot_download(
                path, revision=revision, allow_patterns=wanted, ignore_patterns=_UNUSED
            )
        )
    except Exception as error:  # the hub's client raises its own, requests', and plain ones
        reason = (
            f"{type(error).__name__}:"
            f" {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )
        raise UserError(
            f"{key}: {path!r} is neither a folder on this machine nor could it be downloaded from"
            f" the hub ({reason})"
        ) from None


def read_tensors(key: str, source: Path) -> dict[str, torch.Tensor]:
    """All tensors of a .safetensors file, or of a folder with one such file or an index of several.

    Raises:
        UserError: naming the option `key`, if there are no tensors, or pickled ones only.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(key, source):
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{key}: {file} cannot be read: {error}") from None
    return tensors


def read_config(key: str, folder: Path, model_type: str) -> dict:
    """The folder's config.json; `UserError` unless it describes a model of `model_type`."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: expected a model's folder with a config.json; {file} cannot be read: {error}"
        ) from None
    if config.get("model_type") != model_type:
        raise UserError(
            f"{key}: {file} has model_type {config.get('model_type')!r}, expected {model_type!r}"
        )
    return config


def read_tokenizer(key: str, folder: Path):
    """The folder's tokenizer; `UserError` if it has none."""
    from transformers import AutoTokenizer

    return _part(key, "tokenizer", folder, lambda: AutoTokenizer.from_pretrained(folder))


def read_processor(key: str, folder: Path):
    """The folder's image processor; `UserError` if it has none."""
    from transformers import AutoImageProcessor

    # The rewards' published code resizes with Pillow; torchvision's result differs in the last
    # bits.
    return _part(
        key,
        "image processor",
        folder,
        lambda: AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )


def build(
    key: str, kind: type[T], config, tensors: dict[str, torch.Tensor], dtype, device: str, **options
) -> T:
    """Build a transformers model with given weights, in evaluation mode and without gradients.

    Args:
        key: the option that the weights come from, for error messages.
        kind: the model's class.
        config: its config.
        tensors: its weights by name; others beside them are ignored.
        dtype: of the weights.
        device: "cpu" or "cuda".
        options: further arguments of the class.

    Raises:
        UserError: if tensors are missing, or have other shapes. transformers only warns about
            missing ones, and leaves these weights random.
    """
    try:
        model, report = cast(Any, kind).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{key}: the weights do not fit {kind.__name__}: {error}") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{key}: the weights are not those of this reward: {len(missing)} tensors of"
            f" {kind.__name__} are missing, such as {missing[0]}"
        )
    return model.eval().requires_grad_(False).to(device)


def _part(key: str, what: str, folder: Path, load: Callable[[], T]) -> T:
    """What `load` returns; UserError if it fails."""
    try:
        return load()
    # transformers raises OSError, ValueError, KeyError or TypeError for missing files.
    except Exception as error:
        raise UserError(
            f"{key}: {folder} has no usable {what} ({type(error).__name__}: {error})"
        ) from None


def weight_files(key: str, source: Path) -> list[Path]:
    """The .safetensors files that hold a model's weights: `source` itself, or those of a folder.
    UserError, beginning with `key`, if there are none or if the choice is not clear."""
    if source.is_file():
        if source.suffix != ".safetensors":
            raise UserError(
                f"{key}: {source} is not a .safetensors file; {_how_to_convert(source)}"
            )
        return [source]
    # An index first: the files that it names would otherwise count as several weights.
    indices = sorted(source.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return [
            source / name
            for name in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        ]
    files = sorted(source.glob("*.safetensors"))
    if len(files) == 1 or source / "model.safetensors" in files:
        return [source / "model.safetensors" if len(files) > 1 else files[0]]
    if files:
        raise UserError(
            f"{key}: {source} holds several weight files, {', '.join(f.name for f in files)}; name"
            " one of them"
        )
    pickles = sorted(file for file in source.iterdir() if file.suffix in _PICKLES)
    raise UserError(
        f"{key}: {source} holds no .safetensors;"
        f" {_how_to_convert(pickles[0] if pickles else Path('weights.pt'))}"
    )


def _how_to_convert(file: Path) -> str:
    return (
        "pickled weights are not loaded, because loading them can run code. Convert them once: "
        f"python -m tempflow.rewards.neural.convert {file} {file.with_suffix('.safetensors').name}"
    )
