"""A model's files on this machine: its folder, or what the Hugging Face hub has under its id."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tempflow.errors import UserError, brief, shown

CARDS = Path(__file__).parent.parent / "assets/cards"  # folders of configs without weights
KNOWN = {  # hub ids that one of them describes
    "black-forest-labs/FLUX.1-Canny-dev": "flux-control",
    "black-forest-labs/FLUX.1-Depth-dev": "flux-control",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "black-forest-labs/FLUX.1-Kontext-dev": "flux-kontext",
    "black-forest-labs/FLUX.1-schnell": "flux-schnell",
    "black-forest-labs/FLUX.2-dev": "flux2-dev",
    "black-forest-labs/FLUX.2-klein-4B": "flux2-klein-4b",
    "black-forest-labs/FLUX.2-klein-9B": "flux2-klein-9b",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein-base-4b",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2-klein-base-9b",
    "Qwen/Qwen-Image": "qwen-image",
    "Qwen/Qwen-Image-2.1": "qwen-image-2.1",
    "Qwen/Qwen-Image-Edit": "qwen-image-edit",
    "Qwen/Qwen-Image-Edit-2509": "qwen-image-edit-2509",
    "Qwen/Qwen-Image-Edit-2511": "qwen-image-edit-2511",
    "stabilityai/stable-diffusion-3.5-large": "sd35-large",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "Tongyi-MAI/Z-Image": "z-image",
    "Tongyi-MAI/Z-Image-Turbo": "z-image-turbo",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan21-1b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan21-14b",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan22-a14b",
}
ONE_FILE = (".safetensors", ".sft", ".ckpt", ".gguf", ".pt", ".pth", ".bin")


def local_model(path: str) -> str:
    """The folder that describes a model: itself, or the card of a known hub id; other hub ids stay
    as they are."""
    card = CARDS / KNOWN.get(path, "-")
    return str(card) if not Path(path).exists() and card.is_dir() else path


def model_index(path: str) -> Path:
    """model_index.json of a pipeline folder or hub id, fetched where it must be. UserError where
    there is none."""
    folder = Path(path)
    try:
        if folder.is_file():
            raise UserError(f"model.path: {_one_file(folder)}")
        if not folder.is_dir():
            return fetch(path, "model_index.json")
        if (folder / "model_index.json").is_file():
            return folder / "model_index.json"
    except (
        OSError,
        ValueError,
    ) as error:  # no permission, too long, or characters that no path has
        raise UserError(
            f"model.path: {shown(path, 200)} cannot be read:"
            f" {getattr(error, 'strerror', None) or error}"
        ) from None
    raise UserError(f"model.path: {_another_folder(folder)}")


def fetch(path: str, file: str) -> Path:
    """One file of a hub id. UserError where it cannot be had."""
    import huggingface_hub as hub

    if path.endswith(ONE_FILE):
        raise UserError(f"model.path: file {path} does not exist")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path: folder {path} does not exist (a hub id has the form owner/name)"
        )
    try:
        if not isinstance(hub.try_to_load_from_cache(path, file), str):
            _reach(path, file)
        return Path(hub.hf_hub_download(path, file))
    except Exception as error:
        raise UserError(f"model.path: {hub_fault(path, file, error)}") from None


def _reach(path: str, file: str) -> None:
    """Ask the hub once. Without a network the download itself would ask six times, for half a
    minute and a screen of warnings."""
    import huggingface_hub as hub

    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(path, file))
    except hub.errors.HfHubHTTPError:
        pass  # it answers: the download knows what to make of that, or tries again


def local_folder(path: str, pipeline: Any, left_out: list[str]) -> Path:
    """The folder of a checkpoint, all but the components in left_out downloaded where `path` is a
    hub id. UserError otherwise."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(pipeline.download(path, use_safetensors=True, **dict.fromkeys(left_out)))
    except Exception as error:
        raise UserError(f"model.path: {hub_fault(path, 'its files', error)}") from None


def hub_fault(path: str, file: str, error: Exception) -> str:
    """Why a file of a hub id could not be had, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return (
            f"no folder {path}, and a hub id has the form owner/name, of letters, digits, '-', '_'"
            " and '.'"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{path} is gated: accept its conditions on the hub, and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no folder {path}, and no such model on the hub (of a private one: log in with `hf"
            " auth login`)"
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        return f"{path} on the hub has no {file}: it is no diffusers pipeline"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (
        f"no folder {path}, and {file} of that name cannot be had from the hub"
        f" ({type(cause).__name__}: {brief(cause, 160)}); check the network, HTTPS_PROXY,"
        " HF_ENDPOINT and HF_HUB_OFFLINE, or name a local folder"
    )


def _another_folder(folder: Path) -> str:
    """What a folder without model_index.json is, by what lies in it."""

    def holds(*names: str) -> bool:
        return any((folder / name).exists() for name in names)

    if holds("checkpoints", "metrics.jsonl"):
        return (
            f"{folder} is a run directory; engine/export.py writes its model as a pipeline folder,"
            " or as adapters"
        )
    if holds(
        "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
    ):
        return (
            f"{folder} holds LoRA adapters: name their base model here, and this folder in"
            " model.lora.start"
        )
    if holds("config.json", "scheduler_config.json", "tokenizer_config.json"):
        return (
            f"{folder} is one component of a pipeline; name the folder with model_index.json, often"
            " the one above"
        )
    return f"{folder} has no model_index.json; a folder written by save_pretrained is expected"


def _one_file(file: Path) -> str:
    if file.name == "model_index.json":
        return f"{file} is a file; name its folder, {file.parent}"
    if not file.name.endswith(ONE_FILE):
        return f"{file} is a file; a folder with model_index.json is expected"
    if file.suffix == ".gguf":
        return (
            f"{file} is a checkpoint in one file, and quantised; a diffusers pipeline folder with"
            " whole weights is expected"
        )
    return (
        f"{file} is a checkpoint in one file; convert it with diffusers, FluxPipeline (or"
        f" StableDiffusion3Pipeline).from_single_file({json.dumps(str(file))}).save_pretrained(FOLDER),"
        " and name the folder"
    )


def folder_hash(folders: list[Path]) -> str:
    """SHA-256 over the names and contents of all files of some folders."""
    whole = hashlib.sha256()
    for folder in sorted(folders):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            whole.update(
                f"{folder.name}/{file.relative_to(folder)}\0{file.stat().st_size}\0".encode()
            )
            with open(file, "rb") as content:
                while block := content.read(1 << 24):
                    whole.update(block)
    return whole.hexdigest()
