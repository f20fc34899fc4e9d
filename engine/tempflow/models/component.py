"""One component of a checkpoint's folder: its class, its config, its tensor files, and loading it.

Components are loaded one by one and not by the pipeline as a whole, so that an error can name the
component and the file, and so that a folder may hold some components as a variant
(`model.fp16.safetensors`) and others as plain files. `tempflow.models.checking` checks the same
components before anything is loaded. Pickled weights are never read.
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

# Stem of the names of tensor files, by library.
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
INDEX = ".safetensors.index"
# A damaged number of layers would fill the memory with modules before any shape is compared, even
# on the meta device. Published models have fewer than a hundred.
MOST_LAYERS = 1000
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# Processors of text and images that need torchvision, and the class that reads only the text part
# of the same files, including the chat template.
STAND_INS = {"PixtralProcessor": "AutoTokenizer"}
# Tensor name -> (dtype as safetensors writes it, shape).
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def is_component(value) -> bool:
    """Whether a value of model_index.json names a component: [library, class], or [null, null] for
    one that is absent. Other values are options of the pipeline."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and (value[0] is None or isinstance(value[0], str))
    )


@dataclass(frozen=True)
class Component:
    """A component that model_index.json lists as name: [library, kind]."""

    folder: Path
    """The pipeline's folder."""
    name: str
    """Such as "transformer"; also the name of its folder."""
    library: str
    """"diffusers" or "transformers"."""
    kind: str
    """Name of the class."""

    @property
    def path(self) -> Path:
        """Folder of the component."""
        return self.folder / self.name

    def error(self, reason: str, file: Path | None = None) -> UserError:
        """A UserError that names the component, and the file or else the folder."""
        return UserError(f"model.path: {self.name}: {file or self.path} {reason}")

    @property
    def stand_in(self) -> str | None:
        """Name of the class that is loaded in place of `kind`, or None. It does not depend on
        whether torchvision is installed, so that tokens are the same on every machine."""
        return STAND_INS.get(self.kind) if self.library == "transformers" else None

    @cached_property
    def type(self) -> Any:
        """The class, imported; UserError if the installed library does not have it."""
        try:
            return getattr(importlib.import_module(self.library), self.stand_in or self.kind)
        except (ImportError, AttributeError, ValueError, TypeError):
            raise UserError(
                f"model.path: {self.name}: the installed {self.library} has no {self.kind}; install"
                " a version that has it"
            ) from None

    @property
    def is_module(self) -> bool:
        """Whether it is a torch module; tokenizers, processors and schedulers are not."""
        return isinstance(self.type, type) and issubclass(self.type, torch.nn.Module)

    @cached_property
    def config(self) -> dict:
        """The values of config.json. UserError if it is missing or damaged, or says that the
        weights are quantized."""
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
                f"says that its weights are quantized ({method}), which this engine does not train;"
                " name a folder with float32, bfloat16 or float16 weights",
                file,
            )
        # One level deeper too: configs of text encoders with vision hold text_config and such.
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
                    f"sets {key} to {shown(value)}; at most {MOST_LAYERS} is allowed", file
                )
        return config

    @cached_property
    def files(self) -> list[Path]:
        """The tensor files that will be read. UserError if there are none, or a shard is
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
            raise self.error("is damaged: it names no tensor files; download it again", chosen)
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
        """The variant of the tensor files, such as "fp16" for model.fp16.safetensors; None for
        plain files."""
        return self._variants.get(self._chosen.name)

    @cached_property
    def _variants(self) -> dict[str, str]:
        """The variant of each file that loading can start from, by file name: a single tensor file,
        or the index of several."""
        stem = re.escape(STEMS[self.library])
        # A single file, and the two places at which an index may name the variant.
        names = (
            rf"{stem}\.([^.]+)\.safetensors"
            rf"|{stem}\.safetensors\.index\.([^.]+)\.json"
            rf"|{stem}\.([^.]+)\.safetensors\.index\.json"
        )
        found = {file.name: re.fullmatch(names, file.name) for file in self.path.iterdir()}
        return {
            name: next(filter(None, match.groups()))
            for name, match in found.items()
            if match and "-of-" not in name  # a shard, such as STEM.00001-of-00002.safetensors
        }

    @cached_property
    def _chosen(self) -> Path:
        """The file that loading starts from: a plain one, or else the only variant."""
        stem = STEMS[self.library]
        order = [f"{stem}{INDEX}.json", f"{stem}.safetensors"]
        # Where a folder holds both, diffusers reads the index and transformers the single file.
        for name in order if self.library == "diffusers" else reversed(order):
            if (self.path / name).exists():
                return self.path / name
        variants = sorted(set(self._variants.values()))
        if len(variants) > 1:
            raise self.error(
                f"holds the variants {', '.join(variants)} and no plain {stem}.safetensors; remove"
                " all variants but one"
            )
        if variants:
            return self.path / min(self._variants, key=lambda name: (INDEX not in name, name))
        raise self.error(f"has no tensor file {stem}.safetensors{self._instead()}")

    def _instead(self) -> str:
        """The end of an error message: what the folder holds instead of the tensor file."""
        files = sorted(self.path.iterdir())
        broken = [file.name for file in files if file.is_symlink() and not file.exists()]
        pickles = [file.name for file in files if file.suffix in PICKLES]
        others = [file.name for file in files if file.suffix in (".safetensors", ".gguf")]
        if broken:
            return f"; {listed(broken)} is a link to a file that does not exist"
        if pickles:
            return (
                f"; pickled weights ({listed(pickles)}) are not read; save them with"
                " safe_serialization=True"
            )
        return f"; it holds {listed(others)}" if others else ""

    @cached_property
    def shapes(self) -> Shapes:
        """Dtype and shape of every tensor, from the headers of the files."""
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
        """Load the component. Tensors that the module does not have are reported in a note, since
        config.json may belong to another model.

        Args:
            dtype: of a module's weights.

        Returns:
            A tokenizer, processor or scheduler, or a module on the CPU.

        Raises:
            UserError: it cannot be loaded, the files lack a weight, or a weight is not finite.
        """
        try:
            if not self.is_module:
                return load_part(self.type, str(self.path))
            # The two libraries name the argument differently.
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
        except Exception as error:  # libraries raise errors of many types for a damaged file
            raise self.error(f"cannot be loaded as a {self.kind}: {brief(error)}") from None
        # Both libraries only warn about a missing weight, and train from random values.
        missing = (
            _unfilled(module, found["missing_keys"])
            if self.library == "diffusers"
            else found["missing_keys"]
        )
        if missing:
            raise self.error(f"lacks {listed(sorted(missing))}; download it again")
        if self.library == "diffusers" and found["unexpected_keys"]:
            surplus = listed(sorted(found["unexpected_keys"]))
            note(
                f"model.path: {self.name}: ignored {surplus}, which {self.path / 'config.json'}"
                " does not ask for"
            )
        name = first_not_finite(module)
        if name:
            raise self.error(f"holds NaN or infinity in {name}{_overflow(dtype)}")
        return module


def _unfilled(module: torch.nn.Module, missing: list[str]) -> list[str]:
    """The missing names that are weights; diffusers computes buffers in the constructor."""
    weights = {name for name, _ in module.named_parameters()}
    return [name for name in missing if name in weights]


def _overflow(dtype: torch.dtype) -> str:
    # A finite bfloat16 or float32 weight above 65504 becomes infinity in float16.
    return (
        "; or its values are too large for float16, set model.dtype to bfloat16 or float32"
        if dtype == torch.float16
        else ""
    )


@torch.no_grad()
def first_not_finite(module: torch.nn.Module) -> str | None:
    """Name of the first weight or buffer that holds NaN or infinity; None if all are finite."""
    return next(
        (name for name, tensor in module.state_dict().items() if not is_finite(tensor)), None
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements of a tensor are finite."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    # `aminmax` propagates NaN, and unlike `isfinite` it allocates no mask as long as the weight.
    try:
        low, high = torch.aminmax(tensor)
    except RuntimeError:  # not implemented for this dtype on this device, such as float8
        return bool(torch.isfinite(tensor.float()).all())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def problem_with_file(file: Path) -> str | None:
    """What is wrong with a .safetensors file, judging from its header and length; None if
    nothing."""
    if file.is_dir():
        return "is a folder, not a file"
    try:
        with open(file, "rb") as opened:
            start = opened.read(64)
        if not start:
            return "is empty; download it again"
        if start.startswith(b"version https://git-lfs"):
            return "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
        # Opening compares the header with the length of the file, so a partial download fails.
        with safe_open(file, framework="pt"):
            return None
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except SafetensorError as error:
        return f"is damaged or was not downloaded whole: {brief(error)}"


def read_table(component: Component, file: Path) -> dict:
    """The table in a JSON file of a component. UserError if the file is missing, unreadable, or
    holds something else."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise component.error(f"cannot be read: {error.strerror or error}", file) from None
    except (ValueError, RecursionError) as error:  # the latter: brackets nested thousands deep
        raise component.error(f"is damaged: {brief(error)}", file) from None
    if not isinstance(table, dict):
        raise component.error(f"is damaged: expected a table, got {type(table).__name__}", file)
    return table


class Unfilled(TorchFunctionMode):
    """While it is active, new weights of modules are not initialized. On the meta device there is
    nothing to fill, and the initializers alone take a noticeable part of a dry run's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # torch.nn.init passes all arguments to this hook by name, so the tensor is in kwargs.
        if func in (torch.nn.init.kaiming_uniform_, torch.nn.init.uniform_, torch.nn.init.normal_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(library: str, name: str, config: dict, part: str) -> torch.nn.Module:
    """A module without storage, on the meta device, built from a config.

    Args:
        library: "diffusers" or "transformers".
        name: of the class.
        config: values of its config.json.
        part: name of the component, for errors.

    Raises:
        UserError: the library has no such class, or the config does not describe one.
    """
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
    except Exception as error:  # constructors raise errors of many types for values that do not fit
        raise UserError(
            f"model.path: {part}/config.json does not describe a {name}: {brief(error)}"
        ) from None


def listed(names: list[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
