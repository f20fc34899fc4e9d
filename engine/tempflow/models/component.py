"""One component of a checkpoint's folder: its class, its config, its tensor files, and loading it.

Components are loaded here one by one, and not by the pipeline as a whole, so that an error can name
the component and the file, and so that a folder may hold some components as a variant
(`model.fp16.safetensors`) and others as plain files. What is refused is said in one UserError;
`tempflow.models.checking` looks at the same component before anything is loaded.
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from tempflow.errors import UserError, brief, note, shown
from tempflow.models.processors import load_part

# of tensor files, by library
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
INDEX = ".safetensors.index"
MOST_LAYERS = (
    1000  # the modules of a damaged number would fill the memory before anything is compared
)
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# Processors of text and images that need torchvision, and what reads the text alone from the same
# files, chat template included.
STAND_INS = {"PixtralProcessor": "AutoTokenizer"}
# tensor name -> (dtype as safetensors writes it, shape)
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def is_component(value) -> bool:
    """Whether a value of model_index.json names a component, as [library, class] or [null, null];
    others are a pipeline's options."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and (value[0] is None or isinstance(value[0], str))
    )


@dataclass(frozen=True)
class Component:
    """What model_index.json calls `name`: [library, kind]. folder: the pipeline's."""

    folder: Path
    name: str
    library: str
    kind: str

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def error(self, reason: str, file: Path | None = None) -> UserError:
        return UserError(f"model.path: {self.name}: {file or self.path} {reason}")

    @property
    def stand_in(self) -> str | None:
        """Of the class that is loaded in place of `kind`, with and without torchvision alike."""
        return STAND_INS.get(self.kind) if self.library == "transformers" else None

    @cached_property
    def type(self) -> Any:
        try:
            return getattr(importlib.import_module(self.library), self.stand_in or self.kind)
        except (ImportError, AttributeError, ValueError, TypeError):
            raise UserError(
                f"model.path: {self.name}: the installed {self.library} has no {self.kind}"
            ) from None

    @property
    def is_module(self) -> bool:
        return isinstance(self.type, type) and issubclass(self.type, torch.nn.Module)

    @cached_property
    def config(self) -> dict:
        """config.json. UserError where it is missing or damaged, or says that the weights are
        quantised."""
        file = self.path / "config.json"
        config = read_table(self, file)
        if config.get("quantization_config"):
            settings = config["quantization_config"]
            method = (
                settings.get("quant_method", "of an unnamed kind")
                if isinstance(settings, dict)
                else settings
            )
            raise self.error(
                f"says that its weights are quantised ({method}), which this engine does not train;"
                " name a folder with float32, bfloat16 or float16 weights",
                file,
            )
        for key, value in [
            *config.items(),
            *(
                pair
                for inner in config.values()
                if isinstance(inner, dict)
                for pair in inner.items()
            ),
        ]:
            if (
                key.startswith(("num_", "n_"))
                and key.endswith("layers")
                and isinstance(value, (int, float))
                and value > MOST_LAYERS
            ):
                raise self.error(
                    f"sets {key} to {shown(value)}; at most {MOST_LAYERS} are built", file
                )
        return config

    @cached_property
    def files(self) -> list[Path]:
        """The tensor files that will be read. UserError where there are none, or a shard is
        missing."""
        chosen = self._chosen
        if INDEX not in chosen.name:
            return [chosen]
        shards = read_table(self, chosen).get("weight_map")
        if (
            not isinstance(shards, dict)
            or not shards
            or not all(isinstance(name, str) for name in shards.values())
        ):
            raise self.error("is damaged: it names no tensor files", chosen)
        files = [self.path / name for name in sorted(set(shards.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise self.error(
                f"lacks {listed(missing)} of the {len(files)} files that {chosen.name} names;"
                " download it again"
            )
        return files

    @property
    def variant(self) -> str | None:
        """Of the tensor files: "fp16" in model.fp16.safetensors; None for plain ones."""
        return self._variants.get(self._chosen.name)

    @cached_property
    def _variants(self) -> dict[str, str]:
        """Variant by the name of the file to begin with: one file of tensors, or the index of
        several."""
        stem = re.escape(STEMS[self.library])
        names = (
            rf"{stem}\.([^.]+)\.safetensors"
            rf"|{stem}\.safetensors\.index\.([^.]+)\.json"
            rf"|{stem}\.([^.]+)\.safetensors\.index\.json"
        )
        found = {file.name: re.fullmatch(names, file.name) for file in self.path.iterdir()}
        return {
            name: next(filter(None, match.groups()))
            for name, match in found.items()
            if match and "-of-" not in name
        }

    @cached_property
    def _chosen(self) -> Path:
        """The file that the libraries begin with: plain ones first, else the only variant."""
        stem = STEMS[self.library]
        order = [f"{stem}{INDEX}.json", f"{stem}.safetensors"]
        for name in order if self.library == "diffusers" else reversed(order):
            if (self.path / name).exists():
                return self.path / name
        variants = sorted(set(self._variants.values()))
        if len(variants) > 1:
            raise self.error(
                f"holds the variants {', '.join(variants)} and no plain {stem}.safetensors; leave"
                " one of them there"
            )
        if variants:
            return self.path / min(self._variants, key=lambda name: (INDEX not in name, name))
        raise self.error(f"has no tensor file {stem}.safetensors{self._instead()}")

    def _instead(self) -> str:
        """What the folder holds where the tensor file should be."""
        files = sorted(self.path.iterdir())
        broken = [file.name for file in files if file.is_symlink() and not file.exists()]
        pickles = [file.name for file in files if file.suffix in PICKLES]
        others = [file.name for file in files if file.suffix in (".safetensors", ".gguf")]
        if broken:
            return f"; {listed(broken)} is a link to a file that does not exist"
        if pickles:
            return (
                f"; pickled weights ({listed(pickles)}) are not read, save them with"
                " safe_serialization=True"
            )
        return f"; it holds {listed(others)}" if others else ""

    @cached_property
    def shapes(self) -> Shapes:
        """Of every tensor in the files, from their headers."""
        found: Shapes = {}
        for file in self.files:
            trouble = problem_with_file(file)
            if trouble:
                raise self.error(trouble, file)
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        if not found:
            raise self.error("holds no tensors", self.files[0])
        return found

    def load(self, dtype: torch.dtype) -> Any:
        """The component; a module in `dtype` on the CPU, every weight from the files and finite.
        UserError otherwise.

        A note tells of tensors that the module does not have: config.json may be of another model.
        """
        try:
            if not self.is_module:
                return load_part(self.type, str(self.path))
            key = "torch_dtype" if self.library == "diffusers" else "dtype"
            more = {} if self.variant is None else {"variant": self.variant}
            module, found = self.type.from_pretrained(
                str(self.path),
                use_safetensors=True,
                output_loading_info=True,
                **{key: dtype},
                **more,
            )
        except UserError:
            raise
        except Exception as error:  # whatever a library makes of a damaged file
            raise self.error(f"cannot be loaded as a {self.kind}: {brief(error)}") from None
        missing = (
            _unfilled(module, found["missing_keys"])
            if self.library == "diffusers"
            else found["missing_keys"]
        )
        if missing:
            raise self.error(f"lacks {listed(sorted(missing))}")
        if self.library == "diffusers" and found["unexpected_keys"]:
            surplus = listed(sorted(found["unexpected_keys"]))
            note(
                f"model.path: {self.name}: left out {surplus}, which {self.path / 'config.json'}"
                " does not ask for"
            )
        name = first_not_finite(module)
        if name:
            raise self.error(f"holds NaN or infinity in {name}{_overflow(dtype)}")
        return module


def _unfilled(module: torch.nn.Module, missing: list[str]) -> list[str]:
    """Those of the missing that are weights; diffusers computes buffers itself."""
    weights = {name for name, _ in module.named_parameters()}
    return [name for name in missing if name in weights]


def _overflow(dtype: torch.dtype) -> str:
    return (
        "; or its values are too large for float16, set model.dtype to bfloat16 or float32"
        if dtype == torch.float16
        else ""
    )


@torch.no_grad()
def first_not_finite(module: torch.nn.Module) -> str | None:
    """Name of the first weight with a NaN or infinity; one pass over the memory."""
    return next(
        (name for name, tensor in module.state_dict().items() if not is_finite(tensor)), None
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are; the extremes are read without a copy of the tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    try:
        low, high = torch.aminmax(tensor)
    except RuntimeError:  # a dtype without an ordering on this device
        return bool(torch.isfinite(tensor.float()).all())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def problem_with_file(file: Path) -> str | None:
    """What is wrong with a .safetensors file as a whole, seen from its beginning and length; None
    where nothing is."""
    if file.is_dir():
        return "is a folder, not a file"
    try:
        with open(file, "rb") as opened:
            start = opened.read(64)
        if not start:
            return "is empty; download it again"
        if start.startswith(b"version https://git-lfs"):
            return "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
        with safe_open(file, framework="pt"):
            return None
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except SafetensorError as error:
        return f"is damaged or was not downloaded whole: {brief(error)}"


def read_table(component: Component, file: Path) -> dict:
    """A JSON file of a component. UserError where it is missing, unreadable or no table."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise component.error(f"cannot be read: {error.strerror or error}", file) from None
    except (ValueError, RecursionError) as error:
        raise component.error(f"is damaged: {brief(error)}", file) from None
    if not isinstance(table, dict):
        raise component.error(f"is damaged: expected a table, got {type(table).__name__}", file)
    return table


class Unfilled(TorchFunctionMode):
    """While it is active, modules leave new weights as they are: what has no storage need not be
    filled."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # they give all arguments by name
        if func in (torch.nn.init.kaiming_uniform_, torch.nn.init.uniform_, torch.nn.init.normal_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(library: str, name: str, config: dict, part: str) -> torch.nn.Module:
    """A module on the meta device, as its config describes it: shapes without storage. UserError
    where it cannot be made."""
    kind = getattr(importlib.import_module(library), name, None)
    if kind is None:
        raise UserError(f"model.path: {part}: the installed {library} has no {name}")
    try:
        with torch.device("meta"), Unfilled():
            return (
                kind.from_config(config)
                if library == "diffusers"
                else kind(kind.config_class.from_dict(config))
            )
    except Exception as error:  # whatever a constructor makes of values that do not fit together
        raise UserError(
            f"model.path: {part}/config.json does not describe a {name}: {brief(error)}"
        ) from None


def listed(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
