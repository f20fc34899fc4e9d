"""LoRA adapters: reading saved ones as the start of a run, and merging adapters into weights.

Files are read in diffusers' layout and in peft's, safetensors only. Adapters of text encoders are
refused, because only the denoiser is trained.

    pytorch_lora_weights.safetensors   "transformer.LAYER.lora_A.weight", settings in the file's
                                       metadata (diffusers, engine/export.py)
    adapter_model.safetensors          "base_model.model.LAYER.lora_A.weight", settings in
                                       adapter_config.json beside it (peft, which Flow-GRPO and the
                                       paper's code save with)

The adapters of a denoiser with two transformers are two such files, in folders named after the
transformers, because diffusers loads one file into one transformer.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open

from tempflow.config import Lora
from tempflow.errors import UserError, brief, shown
from tempflow.models.component import is_finite, problem_with_file

KEY = "model.lora.start"
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PREFIXES = ("transformer.", "base_model.model.")
# Names of the folders, and the first part of names in a denoiser of two transformers.
EXPERTS = ("transformer", "transformer_2")
# Settings of peft that change nothing about W + (alpha / rank) B A, whatever their value. Every
# other setting must have its default.
HARMLESS = frozenset(
    (
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "megatron_core",
        "runtime_config",
        "fan_in_fan_out",
        "qalora_group_size",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
        "ephemeral_gpu_offload",
        "rank_pattern",  # `_rank` compares the shapes of the tensors instead
        "ensure_weight_tying",
    )
)
PLAIN = {"peft_type": ("LORA",), "bias": ("none",)}
# Values of init_lora_weights that leave the base's weights unchanged. PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA and others change them, and their adapters fit only the changed base; peft can save these
# as plain adapters of twice the rank, with path_initial_model_for_weight_conversion.
STARTS = (True, False, "gaussian", "orthogonal", "eva")

# Ends of the names of a layer's adapter in training.
LORA_DOWN, LORA_UP = ".lora_A.default.weight", ".lora_B.default.weight"

# "LAYER.lora_A.weight" [rank, in] and "LAYER.lora_B.weight" [out, rank]
Adapters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Saved:
    """Adapters from a file. Each adds (alpha / rank) B A to the weight of its layer."""

    weights: Adapters
    rank: int
    """Rank of every layer."""
    alpha: float
    file: Path
    """Where they were read, for errors; of two files the first."""


def read_adapters(lora: Lora) -> Adapters:
    """The adapters at `lora.start`, in the dtype of the file on the CPU.

    Raises:
        UserError: they cannot be read, or their rank or alpha differs from that of `lora`.
    """
    try:
        saved = load_adapters(Path(cast(str, lora.start)))  # called where `start` is given
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None
    if saved.rank != lora.rank:
        raise UserError(f"model.lora.rank: {lora.rank}, but {saved.file} has rank {saved.rank}")
    if saved.alpha != lora.alpha:
        raise UserError(
            f"model.lora.alpha: {lora.alpha:g}, but {saved.file} has {shown(saved.alpha)} (its"
            " scale is alpha / rank)"
        )
    return saved.weights


def load_adapters(path: Path) -> Saved:
    """Read adapters.

    Args:
        path: a .safetensors file, a folder that holds one, or a folder with the subfolders
            `EXPERTS`, which hold one each.

    Returns:
        The adapters. If the file has no settings, alpha is the rank: scale 1, as in diffusers.

    Raises:
        UserError: they cannot be read, or are of a kind that this engine does not train.
    """
    parts = {name: path / name for name in EXPERTS if (path / name).is_dir()}
    if not parts:
        return _load_file(path)
    saved = {name: _load_file(folder) for name, folder in parts.items()}
    first = next(iter(saved.values()))
    # peft adapts a module with one rank and one alpha, and both experts are one module here.
    for other in saved.values():
        if (other.rank, other.alpha) != (first.rank, first.alpha):
            differ = (
                f"rank {first.rank} and alpha {first.alpha:g}, {other.file} {other.rank} and"
                f" {other.alpha:g}"
            )
            raise UserError(
                f"{first.file} has {differ}; this engine trains with one rank and one alpha for all"
                " layers"
            )
    weights = {
        f"{name}.{layer}": weight
        for name, one in saved.items()
        for layer, weight in one.weights.items()
    }
    return Saved(weights, first.rank, first.alpha, first.file)


def by_expert(adapters: Adapters) -> dict[str, Adapters]:
    """Adapters by the folder that they are saved in; "" for a denoiser with one transformer."""
    found: dict[str, Adapters] = {}
    for name, weight in adapters.items():
        part, _, layer = name.partition(".")
        folder, layer = (part, layer) if part in EXPERTS else ("", name)
        found.setdefault(folder, {})[layer] = weight
    return found


def _load_file(path: Path) -> Saved:
    try:
        file = _find(path)
    except (OSError, ValueError) as error:  # no permission, or a zero byte in the path
        raise UserError(
            f"{shown(str(path))} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        with safe_open(file, framework="pt") as opened:
            settings = _table((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}
        # `lexists`, so that a broken link is an error and not a file without settings, whose scale
        # would be 1.
        if os.path.lexists(beside := file.with_name("adapter_config.json")):
            settings |= _table(beside.read_text(encoding="utf-8"))
        # diffusers writes the settings of all components into one table, with prefixes.
        settings = {
            name.removeprefix("transformer."): value
            for name, value in settings.items()
            if not name.startswith("text_encoder")
        }
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{file} {problem_with_file(file) or f'has unreadable settings: {brief(error)}'}"
        ) from None
    adapters = {_plain_name(name, file): weight for name, weight in weights.items()}
    _check(adapters, settings, file)
    rank = _rank(adapters, file)
    return Saved(adapters, rank, settings.get("lora_alpha", rank), file)


def _table(text: str) -> dict:
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError(f"expected a table, got {shown(table)}")
    return table


def layers_of(adapters: Adapters) -> list[str]:
    """Sorted names of the adapted layers."""
    return sorted({name.rsplit(".lora_", 1)[0] for name in adapters})


def fill(module: torch.nn.Module, adapters: Adapters, adapter: str) -> None:
    """Copy adapters into those of a module.

    Args:
        module: has peft's layers.
        adapters: as `read_adapters` returns them.
        adapter: peft's name of the adapters to fill.

    Raises:
        UserError: the two adapt different layers, or shapes differ.
    """
    held = {
        name.replace(f".{adapter}.weight", ".weight"): p
        for name, p in module.named_parameters()
        if f".{adapter}.weight" in name
    }
    # Sorted, so that all ranks name the same layer.
    for name in sorted(held.keys() ^ adapters.keys()):
        who = (
            "adapts a layer that the run does not"
            if name in adapters
            else "lacks an adapter that the run has"
        )
        raise UserError(
            f"{KEY}: it {who}: {name}; set model.lora.targets to its layers, or to null"
        )
    with torch.no_grad():
        for name, parameter in held.items():
            if parameter.shape != adapters[name].shape:
                shapes = f"{list(adapters[name].shape)}, the model's {list(parameter.shape)}"
                raise UserError(f"{KEY}: {name} is {shapes}; it was trained for another model")
            parameter.copy_(adapters[name])


def merged(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """The merged weight base + scale x up down, as a new tensor.

    Args:
        base: [out, in] of any float dtype.
        down: A, [rank, in].
        up: B, [out, rank].
        scale: alpha / rank.

    Returns:
        fp32 [out, in] on the base's device.
    """
    down, up = (part.to(base.device, torch.float32) for part in (down, up))
    # In place, because one weight of the largest models takes 150 MB in fp32. The base is added in
    # fp32 as well and rounded by the caller, once.
    return (up @ down).mul_(scale).add_(base)


def _find(path: Path) -> Path:
    """The one file of adapters that a path stands for."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    if len(found) != 1:
        held = (
            f"holds {' and '.join(file.name for file in found) or 'none'}"
            if path.is_dir()
            else "is neither"
        )
        expected = (
            f"a .safetensors file, or a folder with {' or '.join(FILES)} (pickle files are not"
            " read)"
        )
        raise UserError(f"expected {expected}; {path} {held}")
    return found[0]


def _plain_name(name: str, file: Path) -> str:
    """A tensor's name without the prefix of its layout; UserError if it is no adapter's."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None or not name.endswith((".lora_A.weight", ".lora_B.weight")):
        raise UserError(f"{file} holds {shown(name)}, {_what_it_is(name)}")
    return name.removeprefix(prefix)


def _what_it_is(name: str) -> str:
    """The end of an error message about a tensor that is no adapter of the transformer."""
    # kohya's names begin with "lora_te".
    if name.startswith(("text_encoder", "lora_te")):
        return (
            "an adapter of a text encoder, but this engine trains only the transformer; save the"
            " file again without the tensors whose names begin so (their effect is lost)"
        )
    if name.endswith((".lora_magnitude_vector", ".dora_scale")):
        return "of DoRA, which this engine does not train"
    return (
        "which is not a transformer adapter in diffusers' or peft's layout; to convert another"
        " layout, load it in diffusers and save it with save_lora_weights"
    )


def _check(adapters: Adapters, settings: dict, file: Path) -> None:
    if not adapters:
        raise UserError(f"{file} holds no adapter")
    _check_settings(settings, file)
    for name, weight in adapters.items():
        if weight.ndim != 2:
            raise UserError(
                f"{file} holds {name} with {weight.ndim} dimensions; only adapters of linear layers"
                " are trained here"
            )
        if not weight.is_floating_point() or not is_finite(weight):
            raise UserError(f"{file} holds whole numbers, NaN or infinity in {name}")
    for name in adapters:
        pair = (
            name.replace(".lora_A.", ".lora_B.")
            if ".lora_A." in name
            else name.replace(".lora_B.", ".lora_A.")
        )
        if pair not in adapters:
            raise UserError(f"{file} holds {name} without {pair}; save it again, or download it")


def _check_settings(settings: dict, file: Path) -> None:
    """Raise a UserError unless the settings are known to mean W + (alpha / rank) B A."""
    from peft import LoraConfig

    start = settings.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if not isinstance(start, (bool, str)) or start not in STARTS:
        raise UserError(
            f"{file} was made with init_lora_weights {shown(start)}, which fits a base that peft"
            " has changed; save it from peft with path_initial_model_for_weight_conversion, which"
            " makes plain adapters of twice the rank"
        )
    default = LoraConfig().to_dict()
    # An unknown setting is refused unless it is empty or the default: later versions of peft add
    # variants of LoRA, whose adapters would load here and compute something else.
    unusual = [
        name
        for name, value in settings.items()
        if name not in HARMLESS
        and name not in PLAIN
        and name != "init_lora_weights"
        and value
        and value != default.get(name)
    ]
    unusual += [
        name
        for name, plain in PLAIN.items()
        if str(settings.get(name, plain[0])).removeprefix("PeftType.") not in plain
    ]
    if unusual:
        raise UserError(
            f"{file} was made with {', '.join(sorted(unusual))}, which this engine does not train"
        )


def _rank(adapters: Adapters, file: Path) -> int:
    """The rank of all layers; UserError if layers differ."""
    layers: dict[int, list[str]] = {}
    for name, weight in adapters.items():
        layers.setdefault(weight.shape[0 if ".lora_A." in name else 1], []).append(
            name.rsplit(".lora_", 1)[0]
        )
    if len(layers) > 1:
        some = "; ".join(
            f"{rank} in {sorted(names)[0]}" for rank, names in sorted(layers.items())[:3]
        )
        raise UserError(
            f"{file} has layers of different ranks ({some}), which this engine does not train: one"
            " rank for all"
        )
    return next(iter(layers))
