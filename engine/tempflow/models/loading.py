"""From a checkpoint's path to a `Policy`; its pipeline class decides which family it is.

The `check_*` functions read only JSON files and the headers of tensor files, so that a run can be
refused before anything is loaded. `load_policy` makes the same checks of the checkpoint again, for
callers that use it alone.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Literal

import torch

from tempflow.compat import multiplies_bfloat16
from tempflow.errors import UserError, brief, shown
from tempflow.models.arguments import as_dtype, check_device, one_of, positive_int
from tempflow.models.base import Policy
from tempflow.models.checking import check_components, components_of, is_description
from tempflow.models.component import is_component
from tempflow.models.hub import fetch, folder_hash, local_folder, model_index
from tempflow.models.quantized import quantize_layers
from tempflow.models.sizes import check_multiple
from tempflow.models.skeleton import plain_options
from tempflow.registry import KINDS
from tempflow.types import Example, Size

FAMILIES = KINDS["policy"].ids  # pipeline class: "module:Policy"
PARTS = ("all", "text", "picture")


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The torch dtype of a name in a config. "auto" is bfloat16 on GPUs and on CPUs with
    instructions for it, else float32."""
    if name != "auto":
        return as_dtype(name)
    fast = torch.device(device).type == "cuda" or multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def check_model(path: str | Path) -> str:
    """The name of a checkpoint's pipeline class, from its model_index.json. For a hub id only that
    file is fetched.

    Raises:
        UserError: a folder or component is missing, or the engine does not know the family.
    """
    folder, index_file = Path(path), model_index(str(path))
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    # Unreadable; not JSON or not UTF-8; brackets nested thousands deep.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.path: {index_file} is damaged: {brief(error)}") from None
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str):
        raise UserError(
            f"model.path: {index_file} is damaged: it names no _class_name of a pipeline"
        )
    if name not in FAMILIES:
        raise UserError(
            f"model.path: {path} is a {name!s:.80}, which this engine does not know; allowed are"
            f" {', '.join(FAMILIES)}"
        )
    if folder.is_dir():
        needed = [part for part, value in index.items() if is_component(value) and value[0]]
        # Not Path.is_dir, which raises if a permission is missing; os.path.isdir returns False.
        missing = [part for part in needed if not os.path.isdir(folder / part)]
        if missing:
            raise UserError(
                f"model.path: {folder} lacks the component{'s' * (len(missing) > 1)}"
                f" {', '.join(missing)}; download it again"
            )
    return name


def check_size(path: str, size: Size) -> None:
    """Raise a UserError for a size that a checkpoint cannot make, according to its VAE's config.
    Call it after `check_model`."""
    file, family = _file_of(path, "vae/config.json"), family_of(path)
    try:
        vae_config = json.loads(file.read_text(encoding="utf-8"))
        multiple, frame_step = family.size_multiple(vae_config), family.frame_step(vae_config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"model.path: {file} is missing or damaged: {brief(error)}") from None
    check_multiple(size, multiple, frame_step)


def takes_guidance(path: str) -> bool:
    """Whether a guidance scale changes the images of a checkpoint, according to its transformer's
    config. Call it after `check_components`."""
    family = family_of(path)
    file = _file_of(path, f"{family.denoiser_parts(_index(path))[0]}/config.json")
    return family.takes_guidance_with(json.loads(file.read_text(encoding="utf-8")))


def _file_of(path: str, name: str) -> Path:
    """A file of a folder or hub id; that of a folder may be missing."""
    return Path(path) / name if Path(path).is_dir() else fetch(path, name)


def check_guidance(path: str, second: float | None) -> None:
    """Raise a UserError for a second guidance scale if the checkpoint has no second expert. Call it
    after `check_model`."""
    if second is not None and len(family_of(path).denoiser_parts(_index(path))) == 1:
        raise UserError(
            f"rollout.guidance_scale_2: {second:g}, but {path} has one transformer and no second"
            " expert; set it to null"
        )


def check_text_length(path: str, asked: int | None) -> int:
    """The number of text tokens of a checkpoint's policy: `asked`, or its pipeline's default for
    None.

    Raises:
        UserError: the family takes fewer.
    """
    family = family_of(path)
    if asked is None:
        return family.text_length
    if asked > family.longest_text:
        raise UserError(
            f"model.max_sequence_length: {asked}; {check_model(path)} takes at most"
            f" {family.longest_text}"
        )
    return asked


def check_examples(path: str, examples: list[Example]) -> None:
    """Raise a UserError for the first example with fewer or more condition images than a
    checkpoint's family takes. Call it after `check_model`."""
    family = family_of(path)
    for example in examples:
        # "source" is the prompt file and line; a prompt that a caller gave as text has none.
        family.check_images(
            example, example.metadata.get("source") or f"prompt {shown(example.text)}"
        )


def family_of(path: str) -> type[Policy]:
    """The policy class of a checkpoint. Raises UserError like `check_model`."""
    # Imported by name and late, because the families import diffusers' models.
    module, _, name = FAMILIES[check_model(path)].partition(":")
    return getattr(importlib.import_module(module), name).variant(_index(path))


def _index(path: str) -> dict:
    """The values of model_index.json, which `check_model` has found sound."""
    return json.loads(model_index(path).read_text(encoding="utf-8"))


def encoder_identity(path: str) -> str:
    """Identifies the weights that embed: the commit of a hub id, or a hash of the files of the
    components that `embed` uses."""
    if not Path(path).is_dir():
        return model_index(path).parent.name  # .../snapshots/COMMIT/model_index.json
    # Beginnings of names, so that text_encoder_2 and tokenizer_2 count as well.
    names = ("text_encoder", "tokenizer", "processor", *family_of(path).embeds_with)
    return folder_hash([p for p in Path(path).iterdir() if p.is_dir() and p.name.startswith(names)])


def check_checkpoint(path: str | Path, *, description: bool = False) -> None:
    """Raise a UserError, which names component and file, for a folder that cannot be trained. Call
    it after `check_model`.

    Args:
        path: of the checkpoint. A hub id is not checked here but by `load_policy`, once it is
            downloaded.
        description: accept a folder of configs without any weights, for estimates.
    """
    if Path(path).is_dir():
        _quiet()
        family = family_of(str(path))
        components = components_of(Path(path), family)
        check_components(
            components, family, weights=not (description and is_description(components))
        )


def _left_out(path: str, parts: str, denoiser: bool) -> list[str]:
    """Names of the components that `load_policy` does not load."""
    family, index = family_of(path), _index(path)
    denoisers = family.denoiser_parts(index)
    if parts == "text":
        # Editing families encode condition images with their VAE.
        return [*denoisers, *({"vae"} - {*family.embeds_with})]
    text = [name for name in index if parts == "picture" and name.startswith("text_encoder")]
    return text if denoiser else [*text, *denoisers]


def _quiet() -> None:
    """Turn off the progress bars of both libraries, which would show for each component."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load_policy(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    max_sequence_length: int | None = None,
    parts: Literal["all", "text", "picture"] = "all",
    denoiser: bool = True,
    offload_text_encoders: bool = False,
    quantize: str | None = None,
) -> Policy:
    """Load a diffusers pipeline as a `Policy`. Every component is checked before the first is
    loaded.

    Args:
        path: pipeline folder or hub id.
        dtype: of all modules: "float32", "bfloat16", "float16", "auto" (bfloat16 on GPUs and on
            CPUs with instructions for it, else float32), or a torch dtype.
        device: where modules are placed.
        max_sequence_length: text tokens; default: that of the family's pipeline.
        parts: "all"; "text" loads only what `embed` needs; "picture" loads everything but the text
            encoders.
        denoiser: False leaves the denoiser out; the caller sets one with `Policy.set_denoiser`.
        offload_text_encoders: keep the weights of text encoders in host memory; each layer is
            copied to the device for its own forward.
        quantize: "8bit" or "4bit" packs the denoiser's large linear layers (`model.quantize`).

    Raises:
        UserError: the checkpoint cannot be trained, an argument has a value that is not allowed, or
            a library is missing.
        ValueError: `max_sequence_length` is not a positive whole number.
    """
    import diffusers

    if not isinstance(path, (str, Path)) or not str(path):
        raise UserError(f"path: expected a pipeline folder or a hub id, got {shown(path)}")
    # Arguments first: `check_model` may fetch files.
    path, _ = str(path), one_of("parts", parts, PARTS)
    if max_sequence_length is not None:
        positive_int("max_sequence_length", max_sequence_length)
    check_device(device)
    dtype = resolve_dtype(dtype, device) if dtype == "auto" else as_dtype(dtype)
    pipeline = getattr(diffusers, check_model(path))
    length, left_out = (
        check_text_length(path, max_sequence_length),
        _left_out(path, parts, denoiser),
    )
    _quiet()
    folder = local_folder(path, pipeline, left_out)
    family, index = family_of(path), _index(path)
    components = [c for c in components_of(folder, family) if c.name not in left_out]
    # Checked again, because a hub id had only its model_index.json before the download.
    check_components(components, family)
    loaded = {component.name: component.load(dtype) for component in components}
    # While the denoiser is on the CPU: the device never holds all of its unpacked weights.
    for name in set(family.denoiser_parts(index)) & loaded.keys():
        quantize_layers(loaded[name], quantize, device)
    pipe = _put_together(pipeline, loaded, index)
    pipe.register_to_config(_name_or_path=str(folder))  # read by `save_pipeline`
    policy = family(
        pipe,
        device=device,
        max_sequence_length=length,
        offload_text_encoders=offload_text_encoders,
    )
    # From the file, because the denoiser may be left out. On this object alone: other checkpoints
    # of the family may take guidance.
    policy.takes_guidance = takes_guidance(path)
    return policy


def _put_together(pipeline: type, components: dict, index: dict):
    """A pipeline made of loaded components."""
    # By its constructor, because its `from_pretrained` would refuse a tokenizer that stands in for
    # a processor (`Component.stand_in`).
    options = plain_options(pipeline, index)
    needed = [
        name
        for name, taken in inspect.signature(pipeline).parameters.items()
        if taken.default is inspect.Parameter.empty
    ]
    # Components that were left out, or that a checkpoint may lack, as SD3 its T5.
    absent = [name for name in needed if name not in components and name not in options]
    return pipeline(**components, **options, **dict.fromkeys(absent))


def save_pipeline(policy: Policy, folder: Path) -> None:
    """Write a loaded policy's pipeline as a folder that diffusers reads. Processors that a
    tokenizer stood in for are copied from the checkpoint."""
    policy.pipe.to("cpu").save_pretrained(folder)
    replaced = [
        c
        for c in components_of(Path(policy.pipe.config["_name_or_path"]), type(policy))
        if c.stand_in
    ]
    if not replaced:
        return
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for component in replaced:
        shutil.rmtree(folder / component.name)
        shutil.copytree(component.path, folder / component.name)
        index[component.name] = [component.library, component.kind]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_denoiser(path: str, dtype: torch.dtype) -> torch.nn.Module:
    """Load another copy of a checkpoint's denoiser, in `dtype` on the CPU. Call it after
    `check_model`. Raises UserError like `load_policy`."""
    import diffusers

    index, family = _index(path), family_of(path)
    parts = family.denoiser_parts(index)
    others = [name for name, value in index.items() if is_component(value) and name not in parts]
    folder = local_folder(path, getattr(diffusers, check_model(path)), others)
    components = {component.name: component for component in components_of(folder, family)}
    return family.join_denoiser(*(components[name].load(dtype) for name in parts))
