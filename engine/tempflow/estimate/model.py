"""A checkpoint as its JSON configs describe it: modules without weights, on the meta device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from tempflow.config import Lora
from tempflow.errors import UserError
from tempflow.estimate.families import INPUTS, Forward, Size
from tempflow.models.component import skeleton
from tempflow.models.loading import family_of


def module_bytes(module: torch.nn.Module) -> int:
    """Of all parameters and buffers, shared ones once."""
    return tensor_bytes([*module.parameters(), *module.buffers()])


def tensor_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Model:
    """The modules of a checkpoint, made anew at each call. folder: where its configs are, or a hub id."""

    folder: str

    def _config(self, part: str) -> dict:
        return _read(self.folder, f"{part}/config.json")

    @property
    def index(self) -> dict:
        return _read(self.folder, "model_index.json")

    @property
    def transformer_class(self) -> str:
        return self.index["transformer"][1]

    def frozen(self, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        """The pipeline's modules but the transformer, by name."""
        index = self.index
        parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
        return {name: self.frozen_part(name, dtype) for name in parts if name.startswith(("text_encoder", "image_encoder", "vae"))}

    def frozen_part(self, name: str, dtype: torch.dtype) -> torch.nn.Module:
        """One of them."""
        return self._build(name, *self.index[name], dtype)

    def transformer(self, dtype: torch.dtype, lora: Lora | None = None) -> torch.nn.Module:
        """As the engine trains it: all of it, or frozen with adapters."""
        module = self._build("transformer", *self.index["transformer"], dtype).train()
        if lora is None:
            return module.requires_grad_(True)
        from tempflow.training.engine import add_lora

        try:
            add_lora(module, lora, family_of(self.folder).lora_targets, 0)
        except ValueError as error:
            raise UserError(f"model.lora: {str(error).splitlines()[0]}") from None
        return module

    def forward(self, size: Size, dtype: torch.dtype) -> Forward:
        if self.transformer_class not in INPUTS:
            raise UserError(
                f"model.path: --dry-run knows no input shapes of a {self.transformer_class}, only of {', '.join(INPUTS)}"
            )
        return INPUTS[self.transformer_class](self._defaults, size, dtype)

    def _defaults(self, part: str) -> dict:
        """A part's config with what its file leaves out."""
        config = _skeleton(self.folder, part, *self.index[part]).config
        return dict(config) if isinstance(config, dict) else config.to_dict()

    def _build(self, part: str, library: str, name: str, dtype: torch.dtype) -> torch.nn.Module:
        module = skeleton(library, name, self._config(part), part)
        keep = list(getattr(module, "_keep_in_fp32_modules", None) or []) if dtype == torch.float16 or library == "diffusers" else []
        keep += list(getattr(module, "_keep_in_fp32_modules_strict", None) or [])
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point() and not set(key.split(".")) & set(keep):
                tensor.data = tensor.data.to(dtype)
        return module


@lru_cache(maxsize=64)
def _skeleton(folder: str, part: str, library: str, name: str) -> torch.nn.Module:
    return skeleton(library, name, _read(folder, f"{part}/config.json"), part)


@lru_cache(maxsize=64)
def _read_text(folder: str, file: str) -> str:
    if not Path(folder).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(folder, file)).read_text()
        except Exception as error:
            raise UserError(f"model.path: cannot fetch {file} of {folder}: {type(error).__name__}") from None
    try:
        return (Path(folder) / file).read_text()
    except OSError as error:
        raise UserError(f"model.path: cannot read {error.filename}: {error.strerror}") from None


def _read(folder: str, file: str) -> dict:
    try:
        return json.loads(_read_text(folder, file))
    except ValueError as error:
        raise UserError(f"model.path: {file} of {folder} is damaged: {error}") from None
