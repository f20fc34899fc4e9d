"""Find changes of config keys with which a run fits its GPU and leaves room (`Estimate.has_room`).

Each change is judged by the dry run's own numbers, and the cheapest ones are tried first. Changes
that keep what is learned come before those that alter it, with one exception: moments in 8 bit come
before moments in host memory, because they cost an update less time. Image sizes and numbers of
samples are never changed: they are what the run is for. The time that a change costs is in its
estimate, as far as counts of operations show it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator

import torch

from tempflow import eight_bit
from tempflow.config import Config, parse_config
from tempflow.errors import UserError
from tempflow.estimate.estimate import Estimate
from tempflow.training.precision import engine_dtype

LEAST = 0.01  # share of the missing memory that a change must save to be proposed
ABOUT = 0.8  # moments above this share of the largest one are lowered together with it
Changes = dict[str, Any]  # new values by dotted key
Judge = Callable[[Config], Estimate]


@dataclass(frozen=True)
class Option:
    """A change that may save memory."""

    changes: Callable[[Config, Estimate], Changes | None]
    """From a config and its estimate to new values; None if there is nothing to change."""
    cost: str
    """What it costs, in words for the user."""


@dataclass(frozen=True)
class Step:
    """A proposed change."""

    changes: Changes
    cost: str
    estimate: Estimate
    """Of the run with this change and all that come before it."""


def _fewer_rows(config: Config, estimate: Estimate) -> Changes | None:
    """Halve the rows of the largest moment, and of all that are nearly as large.

    Memory is the maximum over the moments: of two equal ones, halving one alone saves nothing.
    """
    rows = {
        "training": ("training.micro_batch", config.training.states),
        "rollout": ("rollout.micro_batch", config.rollout.rows),
        "evaluation": ("rollout.micro_batch", config.rollout.rows),
        "decoding": ("rollout.decode_batch", config.rollout.decode_batch),
    }
    moments = estimate.memory.moments
    # Names are those of `memory.memory_of`, such as "training: activations of 8 rows" and
    # "decoding 16 rows"; the first word says which key counts the rows.
    largest = max(item.bytes for item in moments)
    chosen = [
        rows.get(item.name.split(":")[0].split()[0])
        for item in moments
        if item.bytes > ABOUT * largest
    ]
    return {key: number // 2 for key, number in filter(None, chosen) if number > 1} or None


def _set(
    key: str, value, applies: Callable[[Config], bool]
) -> Callable[[Config, Estimate], Changes | None]:
    """The change of one key, for configs that it applies to."""
    return lambda c, _: {key: value} if applies(c) else None


def options(gpus: int) -> list[Option]:
    """All changes that `propose` tries, in this order."""
    return [
        Option(
            _set("data.embedding_cache", "embeddings", lambda c: c.data.embedding_cache is None),
            "prompts are embedded before training and kept on disk",
        ),
        Option(
            _set("model.offload_text_encoders", True, lambda c: not c.model.offload_text_encoders),
            "embedding a text copies the text encoders' weights from host memory, layer by layer",
        ),
        Option(
            _one_base,
            "rollouts and training share the frozen weights, and rollouts compute the adapters"
            " beside them: two more small products in each adapted layer",
        ),
        Option(_fewer_rows, "more forwards of fewer rows; the same updates, except for rounding"),
        Option(
            _set(
                "model.gradient_checkpointing", True, lambda c: not c.model.gradient_checkpointing
            ),
            "training computes every forward twice",
        ),
        Option(
            _set("rollout.graphs", False, lambda c: c.rollout.graphs),
            "the host launches each forward's kernels one by one",
        ),
        Option(
            _set(
                "rollout.suffix.weights",
                "same",
                lambda c: c.rollout.suffix is not None and c.rollout.suffix.weights == "float8",
            ),
            "coarse steps no longer use float8",
        ),
        Option(
            _set(
                "training.reference",
                "offloaded",
                lambda c: c.needs_reference() and c.model.lora is None,
            ),
            "each forward of the reference policy copies its layers from host memory",
        ),
        Option(
            # With adapters not stage 3, at which rollouts cannot share the frozen base.
            lambda c, _: (
                _zero(c, stage=2 if c.model.lora else 3)
                if gpus > 1 and c.zero_stage() < (2 if c.model.lora else 3)
                else None
            ),
            "ranks exchange gradients, and at stage 3 weights, in every micro-batch",
        ),
        Option(
            _moments_in_8_bit,
            "the optimizer's moments are rounded to 8 bit; needs bitsandbytes, the extra quantize",
        ),
        Option(
            _offloaded,
            "the optimizer's state is in host memory, with which every update exchanges data",
        ),
        Option(
            _without_copy,
            "rollouts run the training engine, which is slower at ZeRO stage 3 and without graphs;"
            " evaluations use the raw weights, not their average",
        ),
        Option(
            _bfloat16,
            "weights and activations in bfloat16, with fp32 weights in the optimizer only",
        ),
        Option(
            _quantized,
            "the frozen base is rounded, which changes the reward (docs/log.md), and dequantized in"
            " every forward; needs bitsandbytes, the extra quantize",
        ),
        Option(
            _adapters,
            "another kind of run: it trains adapters, which need another learning rate",
        ),
    ]


def _zero(config: Config, **changes) -> Changes:
    """Some keys of the table zero_optimization, unless they have these values."""
    now = config.deepspeed.get("zero_optimization", {})
    return {
        f"deepspeed.zero_optimization.{key}": value
        for key, value in changes.items()
        if now.get(key, 0) != value
    }


def _one_base(config: Config, _: Estimate) -> Changes | None:
    """With adapters, share the base at the highest stage that can: there is no copy then."""
    if config.model.lora is None or not config.rollout.replica:
        return None
    changes: Changes = {} if config.model.share_base is not False else {"model.share_base": None}
    return (changes | _below_stage_3(config)) or None


def _below_stage_3(config: Config) -> Changes:
    return _zero(config, stage=2) if config.zero_stage() == 3 else {}


def _without_copy(config: Config, _: Estimate) -> Changes | None:
    if not config.rollout.replica:
        return None
    changes: Changes = {"rollout.replica": False}
    return changes | ({"rollout.graphs": False} if config.rollout.graphs else {})


def _adapters(config: Config, _: Estimate) -> Changes | None:
    if config.model.lora is not None:
        return None
    # Their base is frozen, so it is shared with rollouts, and is the reference, too.
    changes: Changes = {"model.lora": {}} | _below_stage_3(config)
    return changes | ({"training.reference": None} if config.training.reference else {})


def _moments_in_8_bit(config: Config, _: Estimate) -> Changes | None:
    optimizer = config.deepspeed["optimizer"]
    # Other optimizers have no 8-bit kind here, and bitsandbytes' does not work with offloading.
    if _offloads(config) or str(optimizer.get("type")).lower() != "adamw":
        return None
    params = optimizer.get("params", {})
    # It refuses DeepSpeed's own parameters, such as torch_adam.
    taken = {key: value for key, value in params.items() if key in eight_bit.PARAMS}
    return {"deepspeed.optimizer": {"type": eight_bit.TYPE, "params": taken}}


def _offloads(config: Config) -> bool:
    zero = config.deepspeed.get("zero_optimization", {})
    return any(key in zero for key in ("offload_optimizer", "offload_param"))


def _offloaded(config: Config, _: Estimate) -> Changes | None:
    if "offload_optimizer" in config.deepspeed.get("zero_optimization", {}):
        return None
    found = _zero(config, stage=max(1, config.zero_stage()), offload_optimizer={"device": "cpu"})
    optimizer = config.deepspeed["optimizer"]
    # The 8-bit optimizer does not work with offloading, so take this option instead of it.
    if eight_bit.asks_for(optimizer):
        params = {**optimizer.get("params", {}), "torch_adam": True}
        found["deepspeed.optimizer"] = {"type": "AdamW", "params": params}
    # Otherwise DeepSpeed compiles its own CPU optimizer, for which many machines lack a compiler.
    return found | {"deepspeed.zero_force_ds_cpu_optimizer": False}


def _bfloat16(config: Config, _: Estimate) -> Changes | None:
    if engine_dtype(config.deepspeed) != torch.float32:
        return None
    # Gradients are summed in fp32: in bfloat16, sums of many micro-batches lose the small ones.
    # Stage 1 at least, because DeepSpeed keeps fp32 weights from that stage on.
    half = {
        "model.dtype": "bfloat16",
        "deepspeed.bf16": {"enabled": True},
        "deepspeed.data_types": {"grad_accum_dtype": "fp32"},
    }
    return half | _zero(config, stage=max(1, config.zero_stage()))


def _quantized(config: Config, _: Estimate) -> Changes | None:
    fewer = {None: "8bit", "8bit": "4bit"}.get(config.model.quantize)
    return {"model.quantize": fewer} if fewer and config.model.lora else None


def propose(config: Config, judge: Judge, gpus: int) -> list[Step]:
    """Find changes with which a run fits its GPU.

    Args:
        config: of the run.
        judge: computes the estimate of a config, for the GPU in question.
        gpus: number of GPUs.

    Returns:
        The changes in order, none of which can be left out. They leave room on the GPU if any do;
        otherwise they save the most memory. An empty list if the run fits unchanged.
    """
    before = judge(config)
    if before.fits:
        return []
    steps = list(_greedy(config, before, judge, options(gpus)))
    return _needed(config, steps, judge) if steps else []


def _greedy(
    config: Config, before: Estimate, judge: Judge, choices: list[Option]
) -> Iterator[Step]:
    """Take the first option that saves memory, repeatedly, until the run has room or none does.

    Each round starts from the first option again, because one that saved nothing may do so after
    another: memory is the maximum over moments. Options such as fewer rows can be taken repeatedly.
    """
    while not before.has_room:
        least = LEAST * (before.total - before.most)
        for option in choices:
            changes = option.changes(config, before)
            made = _made(config, changes, judge)
            if changes is not None and made is not None and before.total - made[1].total >= least:
                config, before = made
                yield Step(changes, option.cost, before)
                break
        else:
            return


def _made(config: Config, changes: Changes | None, judge: Judge) -> tuple[Config, Estimate] | None:
    """A changed config and its estimate; None if nothing changes or the config is refused."""
    if changes is None:
        return None
    try:
        new = changed(config, changes)
        return new, judge(new)
    except UserError:
        return None


def changed(config: Config, changes: Changes) -> Config:
    """Change dotted keys of a config.

    Args:
        config: stays as it is.
        changes: new values by key.

    Raises:
        UserError: the values contradict each other.
    """
    # Parsed anew, so that a proposal is checked exactly like a config of the user.
    table = json.loads(config.model_dump_json())
    for key, value in changes.items():
        *folders, name = key.split(".")
        inner = table
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return parse_config(table)


def _needed(config: Config, steps: list[Step], judge: Judge) -> list[Step]:
    """Reduce steps to the necessary ones: each option once, with the first of its values that
    suffices.

    An option that helped early may be unnecessary after later ones. The most expensive options are
    left out first.
    """
    taken: dict[str, list[Changes]] = {}
    for step in steps:
        values = taken.setdefault(step.cost, [{}])
        values.append(values[-1] | step.changes)
    final, kept = steps[-1].estimate, {cost: values[-1] for cost, values in taken.items()}
    enough = max(final.total, final.most)
    for cost in reversed(list(kept)):
        for changes in taken[cost]:  # no change first
            tried = _made(config, _together({**kept, cost: changes}.values()), judge)
            if tried and tried[1].total <= enough:
                kept[cost] = changes
                break
    # Of each key only the last value counts, and none that the config has already.
    last = _together(kept.values())
    made: Changes = {}
    found = []
    for cost, changes in kept.items():
        new = {key: value for key, value in changes.items() if last[key] == value}
        new = {key: value for key, value in new.items() if _value(config, key) != value}
        if new:
            made |= new
            found.append(Step(new, cost, judge(changed(config, made))))
    return found


def _together(all_changes: Iterable[Changes]) -> Changes:
    return {key: value for changes in all_changes for key, value in changes.items()}


def _value(config: Config, key: str) -> Any:
    """The value of a dotted key; None if a table lacks it."""
    value: Any = json.loads(config.model_dump_json())
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
