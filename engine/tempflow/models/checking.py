"""Checks whether the engine can train a checkpoint's folder, from its JSON files and the headers of
its tensor files, before any weight is loaded.

For every component that the pipeline loads: its class exists, its tensors are there with the shapes
that config.json asks for, and none is quantized; the scheduler's grid is one that the engine
integrates; tokenizers turn text into tokens. The values of tensors are checked when they are loaded
(`Component.load`), and so is a component that its library cannot build without weights.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import cast

import numpy as np
import torch

from tempflow.compat import rename_old_keys
from tempflow.errors import UserError, brief, shown
from tempflow.models.base import Policy
from tempflow.models.component import (
    Component,
    is_component,
    listed,
    read_table,
    skeleton,
)
from tempflow.models.sizes import resolution_shift
from tempflow.models.tokenizer_checks import check_tokenizer

# Every family's `velocity` computes timesteps as 1000 sigma, so another number would be ignored.
TIMESTEPS = 1000
# Options of a scheduler whose effect the engine's own integration does not reproduce.
REFUSED_OPTIONS = {
    "invert_sigmas": "its grid runs from 0 to 1, the engine's from 1 to 0",
    "stochastic_sampling": "it adds noise of its own at every step",
    "thresholding": "it clips what the model predicts",
}
# The engine integrates UniPC's grid by Euler steps, which are UniPC of order 1 without the
# corrector. With other values of these options its sigmas are not those of a flow model.
UNIPC = "UniPCMultistepScheduler"
NEEDED_OPTIONS = {UNIPC: {"prediction_type": "flow_prediction", "use_flow_sigmas": True}}
# Components that a pipeline must have if its constructor takes them.
NEEDED = (
    "vae",
    "scheduler",
    "tokenizer",
    "text_encoder",
    "tokenizer_2",
    "text_encoder_2",
    "processor",
)
# Last parts of the tensor names that quantization tools (bitsandbytes, GPTQ, float8 converters)
# write beside or in place of a weight.
QUANTIZED = (
    "absmax",
    "quant_map",
    "SCB",
    "weight_scale",
    "scale_weight",
    "input_scale",
    "scale_input",
    "qweight",
    "scaled_fp8",
)


def components_of(folder: Path, family: type[Policy]) -> list[Component]:
    """The components that the pipeline in a folder loads.

    Raises:
        UserError: model_index.json names no component that the family needs.
    """
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    # diffusers, too, skips components that the pipeline's constructor does not take.
    taken = inspect.signature(getattr(diffusers, index["_class_name"]).__init__).parameters
    given = {name: value for name, value in index.items() if name in taken and is_component(value)}
    needed = (*family.denoiser_parts(index), *NEEDED)
    lacking = [name for name in needed if name in taken and given.get(name, [None])[0] is None]
    if lacking:
        raise UserError(
            f"model.path: {folder / 'model_index.json'} names no {listed(lacking)}, which"
            f" {index['_class_name']} needs; download the whole pipeline"
        )
    return [
        Component(folder, name, *value) for name, value in given.items() if value[0] is not None
    ]


def check_components(
    components: list[Component], family: type[Policy], *, weights: bool = True
) -> None:
    """Raise a UserError for the first fault of any component.

    Args:
        components: as `components_of` returns them.
        family: of the checkpoint.
        weights: False checks configs only, for a folder without weights.
    """
    for component in components:
        try:
            if component.name == "scheduler":
                check_scheduler(component, family.schedulers)
            elif component.is_module:
                check_module(component, weights)
            elif component.name.startswith("tokenizer") and weights:
                check_tokenizer(component)
            elif component.name == "processor" and weights:
                # Its files are small, and only loading them shows whether they fit together.
                component.load(torch.float32)
        except OSError as error:  # a folder that may not be listed, a disk that fails
            raise component.error(f"cannot be read: {error.strerror or error}") from None


def is_description(components: list[Component]) -> bool:
    """Whether a folder holds configs and no tensors at all, like those in assets/cards."""
    tensors = (".safetensors", ".bin", ".gguf", ".msgpack")
    return not any(
        file.suffix in tensors for c in components if c.path.is_dir() for file in c.path.iterdir()
    )


# ------------------------------------------------------------------------------------------ modules
def check_module(component: Component, weights: bool = True) -> None:
    """Check config, class and tensor shapes of a module. The UserError names the first tensors that
    are missing or have another shape."""
    config = component.config
    whole = (
        None
        if component.library == "transformers"
        else skeleton(component.library, component.kind, config, component.name)
    )
    if not weights:
        return
    compared = (
        _compared_by_transformers(component) if whole is None else _compared(component, whole)
    )
    # A quantized checkpoint also lacks the plain weights; saying that would mislead.
    problem = _quantized(component) or compared
    if problem:
        raise component.error(problem, component.files[0] if len(component.files) == 1 else None)
    if component.name == "vae" and whole is not None:
        check_scales(component, cast(dict, whole.config))


def check_scales(component: Component, config: dict) -> None:
    """Raise a UserError if the numbers that map latents to the VAE's own scale are not finite, or a
    scale is 0. Otherwise the first decoded image would be the first sign."""
    # The VAEs of Qwen-Image and Wan, which have a `z_dim`, have a mean and a deviation per channel.
    lists = config.get("z_dim") is not None
    keys = ("latents_mean", "latents_std") if lists else ("shift_factor", "scaling_factor")
    # FLUX.2's VAE has none of these keys; it has the statistics of a batch norm.
    for key in (key for key in keys if key in config):
        value, count = config.get(key), config["z_dim"] if lists else 1
        numbers = value if lists else [value]
        usable = (
            isinstance(numbers, (list, tuple))
            and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
            and len(numbers) == count
            and not (key in ("latents_std", "scaling_factor") and 0 in numbers)
        )
        if not usable:
            expected = f"{count} finite numbers" if lists else "a finite number"
            raise component.error(
                f"sets {key} to {shown(value)}; expected {expected}, and a scale other than 0",
                component.path / "config.json",
            )


def _compared(component: Component, whole: torch.nn.Module) -> str | None:
    """What the files of a diffusers module lack; None if nothing. Buffers may be missing, because
    the constructor computes them, except for the running statistics of a batch norm."""
    held = {
        name: torch.empty(shape, device="meta") for name, (_, shape) in component.shapes.items()
    }
    # diffusers renames the keys of old VAEs only when it loads a single file.
    if len(component.files) == 1:
        rename_old_keys(whole, held)
    parameters = dict(whole.named_parameters())
    measured = [
        name
        for name, _ in whole.named_buffers()
        if name.endswith((".running_mean", ".running_var"))
    ]
    missing = [name for name in [*parameters, *measured] if name not in held]
    other = [
        (name, tuple(held[name].shape), tuple(tensor.shape))
        for name, tensor in whole.state_dict().items()
        if name in held and held[name].shape != tensor.shape
    ]
    # The first letter of a safetensors dtype: "I8" and "U8" are whole numbers, "F8_E4M3" is not.
    whole_numbers = [name for name in parameters if component.shapes.get(name, "F")[0][0] in "IU"]
    if whole_numbers and not missing:
        return (
            f"holds whole numbers in {listed(whole_numbers)}: quantized weights, which this engine"
            " does not train"
        )
    return _said(component, missing, other)


def _compared_by_transformers(component: Component) -> str | None:
    """What the files of a transformers module lack; None if nothing.

    transformers renames, ties and converts tensors as it loads, so names cannot be compared as they
    are in the files. Its own loading runs on empty tensors on the meta device instead.
    """
    held = {
        name: torch.empty(shape, device="meta") for name, (_, shape) in component.shapes.items()
    }
    try:
        config = component.type.config_class.from_pretrained(str(component.path))
        _, found = component.type.from_pretrained(
            None,
            config=config,
            state_dict=held,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        missing, other = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    except Exception:
        # Either the config describes no model, for which `skeleton` raises a UserError, or the
        # class cannot load in this way; then loading it later shows what is wrong.
        skeleton(component.library, component.kind, component.config, component.name)
        return None
    return _said(component, missing, other)


def _said(component: Component, missing: list[str], other: list[tuple]) -> str | None:
    if missing:
        return (
            f"lacks {listed(missing)}, which config.json asks for;"
            f" {_why_missing(component, missing)}"
        )
    if other:
        name, held, expected = other[0]
        return (
            f"holds {name} as {list(held)} where config.json asks for"
            f" {list(expected)}{_more(other)}; config and tensors are of different models"
        )
    return None


def _more(others: list) -> str:
    return f" (and {len(others) - 1} more)" if len(others) > 1 else ""


def _why_missing(component: Component, missing: list[str]) -> str:
    """The likely cause of missing tensors, from the names that are there, and what to do."""
    names = list(component.shapes)
    if any("_orig_mod." in name for name in names):
        return (
            "its names hold the prefix '_orig_mod.' of torch.compile: save the module inside"
            " (module._orig_mod), or rename them"
        )
    if any(".lora_" in name for name in names):
        return (
            "it holds LoRA adapters: name the base model here, and the adapters in model.lora.start"
        )
    prefix = next(
        (name.removesuffix(missing[0]) for name in names if name.endswith("." + missing[0])), None
    )
    if prefix:
        return (
            f"its names begin with {prefix!r}: save the module without that wrapper, or rename them"
        )
    return "download it again, or save the whole module with save_pretrained"


def _quantized(component: Component) -> str | None:
    marks = [
        name
        for name in component.shapes
        if name.rsplit(".", 1)[-1] in QUANTIZED or ".quant_state." in name
    ]
    if marks:
        return f"holds {listed(marks)}: quantized weights, which this engine does not train"
    return None


# ---------------------------------------------------------------------------------------- scheduler
def check_scheduler(component: Component, known: tuple[str, ...]) -> None:
    """Raise a UserError for a scheduler that the family does not know, whose options change what a
    step does, or whose grid does not fall from 1 to 0."""
    file = component.path / "scheduler_config.json"
    if component.kind not in known:
        raise component.error(
            f"names the scheduler {component.kind}; this engine integrates the grid of"
            f" {' or '.join(known)}: write that class there and its options into {file}",
            component.folder / "model_index.json",
        )
    # Without this, diffusers would ask the hub for a missing file.
    read_table(component, file)
    try:
        scheduler = component.type.from_pretrained(str(component.path))
        sigmas = _grid(scheduler)
    except Exception as error:
        raise component.error(
            f"does not describe a {component.kind}: {brief(error)}", file
        ) from None
    for name, reason in REFUSED_OPTIONS.items():
        if scheduler.config.get(name):
            raise component.error(f"sets {name}: {reason}; set it to false", file)
    for name, value in NEEDED_OPTIONS.get(component.kind, {}).items():
        if scheduler.config[name] != value:
            raise component.error(
                f"sets {name} to {shown(scheduler.config[name])}; only {shown(value)} is allowed",
                file,
            )
    if scheduler.config.num_train_timesteps != TIMESTEPS:
        raise component.error(
            f"sets num_train_timesteps to {scheduler.config.num_train_timesteps}; only {TIMESTEPS}"
            " is allowed",
            file,
        )
    falls = (
        bool((sigmas.diff() < 0).all())
        # A static shift leaves the first sigma an fp32 rounding away from 1.
        and math.isclose(sigmas[0], 1, abs_tol=1e-5)
        and sigmas[-1] == 0
    )
    if not falls:
        grid = ", ".join(f"{sigma:.3g}" for sigma in sigmas.tolist())
        raise component.error(
            f"makes the grid {grid}; the engine needs one that falls from 1 to 0", file
        )


def _grid(scheduler) -> torch.Tensor:
    """A grid of 4 steps, made as the pipelines make theirs for a 512 x 512 image."""
    # Computed for static shifting too, as the families do, so that damaged options fail here.
    steps, shift = (4, resolution_shift(scheduler, 1024, 1.15))
    mu = shift if scheduler.config.get("use_dynamic_shifting") else None
    # Damaged options make NaN or infinity, which the caller reports; numpy's warnings say nothing.
    with np.errstate(all="ignore"):
        scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas
