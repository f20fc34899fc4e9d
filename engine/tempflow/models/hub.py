"""A model's files on this machine: a local folder, or files fetched from the Hugging Face hub.

Every failure is one UserError that says what to do. huggingface_hub is imported only when a hub id
is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tempflow.errors import UserError, brief, shown

CARDS = Path(__file__).parent.parent / "assets/cards"  # folders of configs without weights
KNOWN = {  # hub id: the card that describes it
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
# Endings of checkpoints that are a single file, which this engine does not read.
ONE_FILE = (".safetensors", ".sft", ".ckpt", ".gguf", ".pt", ".pth", ".bin")


def local_model(path: str) -> str:
    """The folder with a model's configs, for estimates without a download: the card of a known hub
    id. Folders and other hub ids are returned as they are."""
    card = CARDS / KNOWN.get(path, "-")
    # A local folder named like a hub id goes first, as in diffusers.
    return str(card) if not Path(path).exists() and card.is_dir() else path


def model_index(path: str) -> Path:
    """The path of model_index.json of a pipeline folder, or of a hub id, from which it is fetched.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    try:
        if folder.is_file():
            raise UserError(f"model.path: {_one_file(folder)}")
        if not folder.is_dir():
            return fetch(path, "model_index.json")
        if (folder / "model_index.json").is_file():
            return folder / "model_index.json"
    # No permission, a path that is too long, or a zero byte in it.
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: {shown(path, 200)} cannot be read:"
            f" {getattr(error, 'strerror', None) or error}"
        ) from None
    raise UserError(f"model.path: {_another_folder(folder)}")


def fetch(path: str, file: str) -> Path:
    """Fetch one file of a hub id, from the hub or its cache; returns its path.

    Raises:
        UserError: the file cannot be fetched, or `path` is no hub id.
    """
    import huggingface_hub as hub

    if path.endswith(ONE_FILE):
        raise UserError(f"model.path: file {path} does not exist")
    # Paths of folders that are not there: asking the hub about them would end in a puzzling error.
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
    """Ask the hub once whether it answers. Without a network the download would try six times, for
    half a minute, and print a screen of warnings."""
    import huggingface_hub as hub

    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(path, file))
    except hub.errors.HfHubHTTPError:
        pass  # it answered with an error, which the download reports, or tries again


def local_folder(path: str, pipeline: Any, left_out: list[str]) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded.

    Args:
        path: folder or hub id.
        pipeline: the diffusers pipeline class.
        left_out: names of components that are not downloaded.

    Raises:
        UserError: the download failed.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        # diffusers does not download components that are passed as None.
        return Path(pipeline.download(path, use_safetensors=True, **dict.fromkeys(left_out)))
    except Exception as error:
        raise UserError(f"model.path: {hub_fault(path, 'its files', error)}") from None


def hub_fault(path: str, file: str, error: Exception) -> str:
    """Why a file of a hub id could not be fetched, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return (
            f"no folder {path}, and not a hub id either: a hub id has the form owner/name, with"
            " letters, digits, '-', '_' and '.'"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{path} is gated: accept its conditions on the hub, and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no folder {path}, and no such model on the hub (if it is private, log in with `hf"
            " auth login`)"
        )
    # LocalEntryNotFoundError derives from EntryNotFoundError, but means that there is no network.
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        return f"{path} on the hub has no {file}: it is not a diffusers pipeline"
    # The innermost cause names the fault; those around it only say that the download failed.
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (
        f"no folder {path}, and {file} of the hub id of that name cannot be fetched"
        f" ({type(cause).__name__}: {brief(cause, 160)}); check the network, HTTPS_PROXY,"
        " HF_ENDPOINT and HF_HUB_OFFLINE, or name a local folder"
    )


def _another_folder(folder: Path) -> str:
    """What a folder without model_index.json is, judging from its files, and what to name
    instead."""

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
            f"{folder} is one component of a pipeline; name the folder that holds model_index.json,"
            " usually the one above"
        )
    return f"{folder} has no model_index.json; a folder written by save_pretrained is expected"


def _one_file(file: Path) -> str:
    """What a file in place of a folder is, and what to name instead."""
    if file.name == "model_index.json":
        return f"{file} is a file; name its folder, {file.parent}"
    if not file.name.endswith(ONE_FILE):
        return f"{file} is a file; a folder with model_index.json is expected"
    if file.suffix == ".gguf":
        return (
            f"{file} is a checkpoint in one file, and quantized; a diffusers pipeline folder with"
            " float32, bfloat16 or float16 weights is expected"
        )
    return (
        f"{file} is a checkpoint in one file; convert it with diffusers, FluxPipeline (or"
        f" StableDiffusion3Pipeline).from_single_file({json.dumps(str(file))}).save_pretrained(FOLDER),"
        " and name the folder"
    )


def folder_hash(folders: list[Path]) -> str:
    """SHA-256 over the names and contents of all files in some folders. It does not depend on where
    the folders are, so a moved checkpoint keeps its hash."""
    whole = hashlib.sha256()
    for folder in sorted(folders):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            # With the size before the contents, no two lists of files give the same bytes.
            whole.update(
                f"{folder.name}/{file.relative_to(folder)}\0{file.stat().st_size}\0".encode()
            )
            with open(file, "rb") as content:
                while block := content.read(1 << 24):  # 16 MiB, since files have many gigabytes
                    whole.update(block)
    return whole.hexdigest()
