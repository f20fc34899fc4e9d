"""From a checkpoint's path to a Policy. Families are named by the pipeline class in model_index.json."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Literal

import torch

from tempflow.errors import UserError
from tempflow.policy.base import Policy, check_multiple
from tempflow.policy.embedding_store import folder_hash

FAMILIES = {
    "FluxPipeline": "tempflow.policy.flux:FluxPolicy",
    "QwenImagePipeline": "tempflow.policy.qwen_image:QwenImagePolicy",
    "StableDiffusion3Pipeline": "tempflow.policy.sd3:SD3Policy",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The torch dtype of a config name; "auto" is bfloat16 on GPUs and on CPUs that multiply it, else float32."""
    if name != "auto":
        return DTYPES[name]
    fast = torch.device(device).type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def check_model(path: str) -> str:
    """The pipeline class of a checkpoint, read without loading it.

    Raises UserError for a missing folder or component, or a family that the engine does not know. A hub id is fetched
    as far as its model_index.json.
    """
    folder, index_file = Path(path), _index_file(path)
    try:
        index = json.loads(index_file.read_text())
        name = index.get("_class_name")
    except (ValueError, AttributeError) as error:  # no JSON, no UTF-8, no table
        raise UserError(f"model.path: {index_file} is damaged: {error}") from None
    if name not in FAMILIES:
        raise UserError(f"model.path: {path} is a {name}; known are {', '.join(FAMILIES)}")
    if folder.is_dir():
        needed = [part for part, value in index.items() if isinstance(value, list) and value[0]]
        missing = [part for part in needed if not (folder / part).is_dir()]
        if missing:
            raise UserError(f"model.path: {folder} lacks the component{'s' * (len(missing) > 1)} {', '.join(missing)}")
    return name


def check_size(path: str, height: int, width: int) -> None:
    """UserError for a picture size that a checkpoint cannot make, read from its VAE's config; after `check_model`."""
    file = Path(path) / "vae/config.json"
    file = file if Path(path).is_dir() else _fetch(path, "vae/config.json")
    try:
        multiple = family_of(path).size_multiple(json.loads(file.read_text()))
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"model.path: {file} is missing or damaged: {error}") from None
    check_multiple(height, width, multiple)


def check_text_length(path: str, asked: int | None) -> int:
    """Text tokens of a checkpoint's policy: as many as asked for, or its pipeline's default. UserError where it takes fewer."""
    family = family_of(path)
    if asked and asked > family.longest_text:
        raise UserError(f"model.max_sequence_length: {asked}; {check_model(path)} takes {family.longest_text} at most")
    return asked or family.text_length


def family_of(path: str) -> type[Policy]:
    """The policy class of a checkpoint; UserError as `check_model`."""
    module, _, name = FAMILIES[check_model(path)].partition(":")
    return getattr(importlib.import_module(module), name)


def encoder_identity(path: str) -> str:
    """What a checkpoint's text encoders and tokenizers are known by: the hub's commit, or a hash of their files."""
    if not Path(path).is_dir():
        return _index_file(path).parent.name  # .../snapshots/COMMIT/model_index.json
    return folder_hash([p for p in Path(path).iterdir() if p.is_dir() and p.name.startswith(("text_encoder", "tokenizer"))])


def _index_file(path: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        return _fetch(path, "model_index.json")
    if not (folder / "model_index.json").exists():
        raise UserError(f"model.path: {folder} has no model_index.json; a folder written by save_pretrained is expected")
    return folder / "model_index.json"


def _left_out(path: str, parts: str) -> list[str]:
    if parts == "text":
        return ["transformer", "vae"]
    index = json.loads(_index_file(path).read_text())
    return [name for name in index if parts == "picture" and name.startswith("text_encoder")]


def _fetch(path: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"model.path: folder {path} does not exist (a hub id has the form owner/name)")
    try:
        return Path(hf_hub_download(path, file))
    except Exception as error:
        raise UserError(f"model.path: no folder {path}, and no such model on the hub: {type(error).__name__}") from None


def load_policy(
    path: str, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu",
    max_sequence_length: int | None = None, parts: Literal["all", "text", "picture"] = "all", transformer: bool = True,
) -> Policy:  # fmt: skip
    """Load a diffusers pipeline folder (or hub id) as a Policy; the family is read from its model_index.json.

    dtype: "float32", "bfloat16", "float16", "auto", or a torch dtype. max_sequence_length: text tokens; default: as many as
    the family's pipeline takes by default. parts: "text" loads the text encoders alone, for `embed`; "picture" everything but
    them. transformer=False leaves it out, for the caller to register one. Raises UserError as `check_model` does.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline_class = check_model(str(path))
    dtype = resolve_dtype(dtype, device) if isinstance(dtype, str) else dtype
    length = check_text_length(str(path), max_sequence_length)
    absent = dict.fromkeys([*_left_out(str(path), parts), *([] if transformer else ["transformer"])])
    try:
        pipe = getattr(diffusers, pipeline_class).from_pretrained(str(path), torch_dtype=dtype, use_safetensors=True, **absent)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: cannot load {path}: {error}") from None
    return family_of(str(path))(pipe, device=device, max_sequence_length=length)


def load_transformer(path: str, dtype: torch.dtype) -> torch.nn.Module:
    """Another copy of a checkpoint's transformer, in `dtype` on the CPU; after `check_model`."""
    import diffusers

    kind = getattr(diffusers, json.loads(_index_file(path).read_text())["transformer"][1])
    return kind.from_pretrained(str(path), subfolder="transformer", torch_dtype=dtype, use_safetensors=True)
