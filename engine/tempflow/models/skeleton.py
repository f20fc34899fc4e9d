"""Builds a pipeline from its JSON configs alone, for estimates and checks without weights.

All modules are on the meta device, where tensors have shapes but no storage. There are no
tokenizers, so nothing can be embedded.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch

from tempflow.compat import kept_in_float32
from tempflow.errors import UserError, brief
from tempflow.models.component import is_component, skeleton
from tempflow.models.hub import fetch


class NoProcessor:
    """Stands in for a processor that is not loaded: the constructors of some pipelines ask theirs
    for token ids."""

    @property
    def tokenizer(self) -> NoProcessor:
        return self

    # No tokens, and token 0: the estimate does not depend on how long the template is.
    def apply_chat_template(self, *args, **options) -> list[list[int]]:
        return [[]]

    def encode(self, text: str) -> list[int]:
        return [0]


def not_loaded(part: str) -> NoProcessor | None:
    """What a pipeline gets in place of a component that is not loaded."""
    return NoProcessor() if part == "processor" else None


def skeleton_pipe(path: str, dtype: torch.dtype):
    """The pipeline of a folder or hub id, without weights.

    Args:
        path: only its JSON files are read, or fetched.
        dtype: of the weights, except for those that loading keeps in float32.

    Raises:
        UserError: a config is missing or does not fit its class.
    """
    import diffusers

    index = read_index(path)
    parts = {
        name: _part(path, name, value, dtype)
        for name, value in index.items()
        if is_component(value)
    }
    kind = getattr(diffusers, index["_class_name"])
    return kind(**parts, **plain_options(kind, index))


def plain_options(pipeline: Any, index: dict) -> dict:
    """Arguments of a pipeline's constructor in its model_index.json that are not components, such
    as `is_distilled`."""
    taken = inspect.signature(pipeline.__init__).parameters
    return {
        name: value for name, value in index.items() if name in taken and not is_component(value)
    }


def skeleton_module(path: str, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """One of a pipeline's modules without weights; a new one at each call."""
    return _part(path, part, read_index(path)[part], dtype)


def read_index(path: str) -> dict:
    """The values of model_index.json of a folder or hub id."""
    return _table(path, "model_index.json")


def _part(path: str, name: str, value: Any, dtype: torch.dtype):
    """A component, from its entry [library, class] in model_index.json."""
    library, kind = value
    if name == "scheduler":
        return getattr(importlib.import_module(library), kind).from_config(
            _table(path, "scheduler/scheduler_config.json")
        )
    # Tokenizers and processors need files besides their configs, and estimates do not use them.
    if library is None or not name.startswith(
        ("transformer", "vae", "text_encoder", "image_encoder")
    ):
        return not_loaded(name)
    module = skeleton(library, kind, _table(path, f"{name}/config.json"), name)
    # Cast tensor by tensor: a `to` of the module would also cast those that loading keeps.
    keep = kept_in_float32(module, dtype)
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not set(key.split(".")) & keep:
            tensor.data = tensor.data.to(dtype)
    return module


def _table(path: str, file: str) -> dict:
    try:
        return json.loads(_text(path, file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"model.path: {file} of {path} is missing or damaged: {brief(error)}"
        ) from None


def _text(path: str, file: str) -> str:
    return (Path(path) / file if Path(path).is_dir() else fetch(path, file)).read_text(
        encoding="utf-8"
    )
