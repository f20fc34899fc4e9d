"""Weighted means of what several runs trained: whole weights, or LoRA adapters.

The mean of the factors A and of the factors B does not give the mean of the updates scale x B A,
because the product of means is another matrix. Here the factors are concatenated instead: the
merged adapter adds exactly the weighted mean of the updates, and its rank is the sum of the ranks.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, cast

import torch

from tempflow.checkpoints import load
from tempflow.errors import UserError, shown
from tempflow.models import check_model, load_policy
from tempflow.models.loading import load_denoiser
from tempflow.models.lora import Adapters, load_adapters
from tempflow.run.directory import read_config
from tempflow.run.environment import choose_device

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scaled:
    """Adapters that add scale x B A to their layers."""

    weights: Adapters
    """A and B of each layer, by name."""
    scale: float
    """alpha / rank."""
    rank: int


@dataclass(frozen=True)
class Source:
    """One of the things to be merged, as far as it is known without reading its weights."""

    path: Path
    """As the user named it."""
    lora: bool
    """Whether it holds adapters, not whole weights."""
    run: Path | None
    """The run directory that it belongs to; None for models and adapters in files."""
    model: str | None
    """The pipeline that it was trained from, or is. None for adapters in a file, which do not name
    their model."""
    read: Callable[[], Weights | Scaled]
    """Reads the weights. Raises UserError."""

    @property
    def kind(self) -> str:
        """For messages."""
        return "adapters" if self.lora else "a whole model"


def find_source(path: Path, checkpoint: int | str | None = None) -> Source:
    """Find out what lies at a path.

    Args:
        path: a run directory, one of its checkpoint folders, a diffusers folder, or adapters.
        checkpoint: for a run directory, as `load_tuned` takes it.

    Raises:
        UserError: for anything else.
    """
    # In this order: a run directory is known by its config.json, and a checkpoint by its parent;
    # a diffusers folder has model_index.json and no config.json of its own.
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return _of_run(path, path.parent.parent, int(path.name))
    if (path / "config.json").is_file():
        return _of_run(path, path, checkpoint)
    if (path / "model_index.json").is_file():
        check_model(path)
        return Source(path, False, None, str(path), partial(_read_model, str(path)))
    try:
        saved = load_adapters(path)
    except UserError as error:
        raise UserError(
            f"{path} is no run directory, checkpoint folder or diffusers folder, and no LoRA"
            f" weights: {error}"
        ) from None
    return Source(
        path,
        True,
        None,
        None,
        lambda: Scaled(saved.weights, _scale(saved.alpha, saved.rank, path), saved.rank),
    )


def _of_run(path: Path, run: Path, checkpoint: int | str | None) -> Source:
    config = read_config(run)
    return Source(
        path,
        config.model.lora is not None,
        run,
        config.model.path,
        partial(_read_run, run, checkpoint),
    )


def _read_run(run: Path, checkpoint: int | str | None) -> Weights | Scaled:
    chosen = load.load_tuned(run, checkpoint)
    lora = chosen.config.model.lora  # of the run: its checkpoint holds tensors alone
    if lora is None:
        return chosen.weights
    # peft names the adapters of a model, "default" here; in a file they have no such name.
    plain = {
        name.replace(".default.weight", ".weight"): weight
        for name, weight in chosen.weights.items()
    }
    return Scaled(plain, lora.alpha / lora.rank, lora.rank)


def _read_model(path: str) -> Weights:
    return {
        name: parameter.detach()
        for name, parameter in load_denoiser(path, torch.float32).named_parameters()
    }


def _scale(alpha, rank: int, path: Path) -> float:
    # From the header of somebody's file, so anything may come.
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UserError(f"{path}: expected a number as lora_alpha, got {shown(alpha)}")
    return alpha / rank


def check_sources(sources: list[Source]) -> None:
    """Check what can be checked before any weights are read.

    Raises:
        UserError: for sources of different kinds, bases or families.
    """
    first = sources[0]
    # An adapter is a difference, a whole model a point: their mean is neither.
    for other in sources[1:]:
        if other.lora is not first.lora:
            whole = "; a LoRA run is a whole model when it was exported with --merge"
            raise UserError(f"{first.path} is {first.kind}, {other.path} is {other.kind}{whole}")
    # A mean of weights is only meaningful between models that started from the same point.
    trained = [source for source in sources if source.run]
    for other in trained[1:]:
        if _same_place(other.model) != _same_place(trained[0].model):
            bases = (
                f"{trained[0].path} started from {trained[0].model}, {other.path} from"
                f" {other.model}"
            )
            raise UserError(f"{bases}; only runs of one base model can be merged")
    # By class: models in folders have no base on record, but another family cannot fit at all.
    families = {check_model(source.model): source.path for source in sources if source.model}
    if len(families) > 1:
        raise UserError(
            "; ".join(f"{path} is of a {family}" for family, path in families.items())
            + ": only one model can be merged"
        )


def _same_place(model: str | None) -> str | None:
    # A hub id is no folder, and is compared as it is.
    return os.path.realpath(model) if model and os.path.isdir(model) else model


def shares(given: list[float] | None, count: int) -> list[float]:
    """The weight of each source in the mean.

    Args:
        given: --weights; None: equal weights.
        count: number of sources.

    Raises:
        UserError: unless there are `count` numbers above 0 whose sum is 1.
    """
    if given is None:
        return [1 / count] * count
    if (
        len(given) != count
        or not all(math.isfinite(w) and w > 0 for w in given)
        or abs(sum(given) - 1) > 1e-6  # 0.3 0.3 0.4 and the like do not add up to 1 exactly
    ):
        raise UserError(
            f"--weights: expected {count} numbers above 0 whose sum is 1, got"
            f" {' '.join(f'{w:g}' for w in given)}"
        )
    return given


def merge_models(sources: list[Source], parts: list[float]) -> Weights:
    """The weighted mean of whole weights, in fp32.

    Args:
        sources: of whole weights.
        parts: the weight of each.

    Raises:
        UserError: where names or shapes differ.
    """
    found: Weights = {}
    for number, (source, part) in enumerate(zip(sources, parts, strict=True)):
        # Read within the loop: memory holds the sum and one source, however many there are.
        weights = cast(Weights, source.read())
        # fp32: sums of many small parts would round away in bf16.
        if number == 0:
            found = {
                name: torch.zeros_like(weight, dtype=torch.float32)
                for name, weight in weights.items()
            }
        _check_alike(sources[0], _shapes(found), source, _shapes(weights))
        for name, weight in weights.items():
            found[name].add_(weight.float(), alpha=part)
    return found


def merge_adapters(sources: list[Source], parts: list[float]) -> tuple[Adapters, int]:
    """Adapters that add the weighted mean of what the sources add.

    A = [A_1; A_2; ...] and B = [p_1 s_1 B_1, p_2 s_2 B_2, ...] for parts p and scales s, so that
    B A = sum_i p_i s_i B_i A_i. The ranks of the sources may differ.

    Args:
        sources: of adapters.
        parts: the weight of each.

    Returns:
        fp32 adapters of scale 1 (alpha = rank), and their rank, the sum of the sources' ranks.

    Raises:
        UserError: where the layers or their sizes differ.
    """
    read = [cast(Scaled, source.read()) for source in sources]
    for source, scaled in zip(sources, read, strict=True):
        _check_alike(sources[0], _sizes(read[0].weights), source, _sizes(scaled.weights))
    found = {}
    for name in read[0].weights:
        if ".lora_A." in name:
            found[name] = torch.cat([scaled.weights[name].float() for scaled in read])
        else:
            # Part and scale go into B alone; in A as well they would count twice in the product.
            ups = [
                scaled.weights[name].float() * (part * scaled.scale)
                for part, scaled in zip(parts, read, strict=True)
            ]
            found[name] = torch.cat(ups, dim=1)
    return found, sum(scaled.rank for scaled in read)


def _shapes(weights: Weights) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in weights.items()}


def _sizes(adapters: Adapters) -> dict[str, list[int]]:
    """The size of the adapted layer, without the rank: inputs for an A, outputs for a B."""
    return {
        name: [weight.shape[1 if ".lora_A." in name else 0]] for name, weight in adapters.items()
    }


def _check_alike(
    first: Source, mine: dict[str, list[int]], other: Source, theirs: dict[str, list[int]]
) -> None:
    # Sorted, so that the same two sources always give the same message.
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            holder, lacks = (first, other) if name in mine else (other, first)
            raise UserError(
                f"{holder.path} holds {name}, which {lacks.path} lacks; only weights of the same"
                " layers can be merged"
            )
        if mine[name] != theirs[name]:
            raise UserError(
                f"{name} has size {mine[name]} in {first.path} and {theirs[name]} in {other.path};"
                " they are of different models"
            )


def whole_pipeline(sources: Iterable[Source], dtype: str):
    """The policy of the first source with its whole pipeline, to load merged weights into."""
    # Only adapters in a file name no model, and they are not written as a pipeline.
    model = cast(str, next(iter(sources)).model)
    return load_policy(model, dtype=dtype, device=choose_device())
