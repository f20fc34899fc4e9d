"""LoRA adapters that others saved, as the start of a run: diffusers' file layout and peft's, safetensors only.

    pytorch_lora_weights.safetensors   "transformer.LAYER.lora_A.weight", settings in the file's metadata (diffusers,
                                       engine/export.py)
    adapter_model.safetensors          "base_model.model.LAYER.lora_A.weight", settings in adapter_config.json beside it (peft,
                                       which Flow-GRPO and the paper's code save with)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tempflow.config import Lora
from tempflow.errors import UserError

KEY = "model.lora.start"
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PREFIXES = ("transformer.", "base_model.model.")
# Settings under which peft computes something else than base + alpha / rank x B A.
OTHER_KINDS = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "lora_bias")


Adapters = dict[str, torch.Tensor]  # "LAYER.lora_A.weight" [rank, in] and "LAYER.lora_B.weight" [out, rank]


def read_adapters(lora: Lora) -> Adapters:
    """The adapters at `lora.start`. UserError where they cannot be read, or are of another rank or scale than `lora` says.

    A file without settings has the scale 1 that diffusers gives it.
    """
    file = _find(Path(lora.start))
    try:
        with safe_open(file, framework="pt") as opened:
            settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}
        if file.with_name("adapter_config.json").exists():
            settings |= json.loads(file.with_name("adapter_config.json").read_text())
        settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{KEY}: {file} cannot be read: {error}") from None
    adapters = {_plain_name(name, file): weight for name, weight in weights.items()}
    _check(adapters, settings, lora, file)
    return adapters


def layers_of(adapters: Adapters) -> list[str]:
    """Names of the layers that they adapt."""
    return sorted({name.rsplit(".lora_", 1)[0] for name in adapters})


def fill(module: torch.nn.Module, adapters: Adapters, adapter: str) -> None:
    """Copy adapters into those that the module has under the name `adapter`; UserError where their layers differ."""
    held = {name.replace(f".{adapter}.weight", ".weight"): p for name, p in module.named_parameters() if f".{adapter}.weight" in name}
    for name in sorted(held.keys() ^ adapters.keys()):
        who = "adapts a layer that the run does not" if name in adapters else "lacks an adapter that the run has"
        raise UserError(f"{KEY}: it {who}: {name}; set model.lora.targets to its layers, or leave it null")
    with torch.no_grad():
        for name, parameter in held.items():
            if parameter.shape != adapters[name].shape:
                shapes = f"{list(adapters[name].shape)}, the model's {list(parameter.shape)}"
                raise UserError(f"{KEY}: {name} is {shapes}; it was made for another model")
            parameter.copy_(adapters[name])


def _find(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    if len(found) != 1:
        held = f"holds {' and '.join(file.name for file in found) or 'none'}" if path.is_dir() else "is neither"
        expected = f"a .safetensors file, or a folder with {' or '.join(FILES)} (pickle files are not read)"
        raise UserError(f"{KEY}: expected {expected}; {path} {held}")
    return found[0]


def _plain_name(name: str, file: Path) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None or not name.endswith((".lora_A.weight", ".lora_B.weight")):
        raise UserError(
            f"{KEY}: {file} holds {name!r}, which is no transformer adapter in diffusers' or peft's layout; loading it in diffusers "
            "and saving it with save_lora_weights converts other layouts"
        )
    return name.removeprefix(prefix)


def _check(adapters: Adapters, settings: dict, lora: Lora, file: Path) -> None:
    if not adapters:
        raise UserError(f"{KEY}: {file} holds no adapter")
    unusual = [name for name in OTHER_KINDS if settings.get(name)]
    if unusual:
        raise UserError(f"{KEY}: {file} was made with {', '.join(unusual)}, which this engine does not train")
    rank = next(w.shape[0 if ".lora_A." in name else -1] for name, w in adapters.items())
    alpha = settings.get("lora_alpha", rank)
    if rank != lora.rank:
        raise UserError(f"model.lora.rank: {lora.rank}, but {file} has rank {rank}")
    if alpha != lora.alpha:
        raise UserError(f"model.lora.alpha: {lora.alpha:g}, but {file} has {alpha} (its scale is alpha / rank)")
