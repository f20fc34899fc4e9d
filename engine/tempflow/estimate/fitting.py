"""What would make a run fit its card: changes of config keys, those that cost least first, each
judged by the dry run's own numbers.

Changes that leave what is learned as it is come before those that do not, but for moments in 8 bit,
which cost an update less time than moments in host memory; sizes and numbers of samples are not
touched, because they are the run's purpose. What a change costs in time is in its
estimate, as far as operations say it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch

from tempflow import eight_bit
from tempflow.config import Config, parse_config
from tempflow.errors import UserError
from tempflow.estimate.estimate import Estimate
from tempflow.training.precision import engine_dtype

LEAST = 0.01  # of what is too much: what a change saves at least, to be worth naming
ABOUT = 0.8  # of the largest moment: those that are lowered with it
Changes = dict[str, Any]  # value by dotted key
Judge = Callable[[Config], Estimate]


@dataclass(frozen=True)
class Option:
    """A change that may save memory."""

    changes: Callable[[Config, Estimate], Changes | None]
    """Its keys' new values for a config and what that needs; None where it has nothing to
    change."""
    cost: str


@dataclass(frozen=True)
class Step:
    """A change that is proposed, with what the run needs when it and all before it are made."""

    changes: Changes
    cost: str
    estimate: Estimate


def _fewer_rows(config: Config, estimate: Estimate) -> Changes | None:
    """Half the rows of each moment that is about the largest: where two are equal, either alone
    saves nothing."""
    rows = {
        "training": ("training.micro_batch", config.training.states),
        "rollout": ("rollout.micro_batch", config.rollout.rows),
        "evaluation": ("rollout.micro_batch", config.rollout.rows),
        "decoding": ("rollout.decode_batch", config.rollout.decode_batch),
    }
    moments = estimate.memory.moments
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
    return lambda c, _: {key: value} if applies(c) else None


def _stage(config: Config) -> int:
    return config.deepspeed.get("zero_optimization", {}).get("stage", 0)


def options(gpus: int) -> list[Option]:
    """Those that `propose` tries, in its order."""
    return [
        Option(
            _set("data.embedding_cache", "embeddings", lambda c: c.data.embedding_cache is None),
            "prompts are embedded before training and kept on disk",
        ),
        Option(
            _set("model.offload_text_encoders", True, lambda c: not c.model.offload_text_encoders),
            "embedding a text brings the text encoders' weights from host memory, layer by layer",
        ),
        Option(
            _set("model.share_base", None, lambda c: c.model.share_base is False),
            "rollouts apply the adapters beside the frozen weights: two small products more in each"
            " adapted layer",
        ),
        Option(_fewer_rows, "more forwards of fewer rows; the same updates, but for rounding"),
        Option(
            _set(
                "model.gradient_checkpointing", True, lambda c: not c.model.gradient_checkpointing
            ),
            "training computes each forward twice",
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
            "coarse steps are no longer in float8",
        ),
        Option(
            _set(
                "training.reference",
                "offloaded",
                lambda c: c.needs_reference() and c.model.lora is None,
            ),
            "the reference policy's layers come from host memory in each of its forwards",
        ),
        Option(
            lambda c, _: (
                _zero(c, stage=2 if c.model.lora else 3)
                if gpus > 1 and _stage(c) < (2 if c.model.lora else 3)
                else None
            ),
            "ranks exchange gradients, and at stage 3 weights, in every micro-batch",
        ),
        Option(
            _moments_in_8_bit,
            "the optimizer's moments are rounded to 8 bit; needs bitsandbytes, the extra quantize",
        ),
        Option(
            _offloaded, "the optimizer's state is in host memory, and every update crosses the bus"
        ),
        Option(
            _set("rollout.replica", False, lambda c: c.rollout.replica),
            "rollouts go through the training engine, slower at ZeRO stage 3; evaluations use the"
            " raw weights, not their average",
        ),
        Option(
            _bfloat16,
            "weights and activations in bfloat16, with fp32 weights in the optimizer alone",
        ),
        Option(
            _quantized,
            "the frozen base is rounded, which changes the reward (docs/log.md), and unpacked in"
            " every forward; needs bitsandbytes, the extra quantize",
        ),
        Option(
            _set("model.lora", {}, lambda c: c.model.lora is None),
            "another run: adapters in place of all weights, with a learning rate of their own",
        ),
    ]


def _zero(config: Config, **changes) -> Changes:
    return {
        "deepspeed.zero_optimization": {**config.deepspeed.get("zero_optimization", {}), **changes}
    }


def _moments_in_8_bit(config: Config, _: Estimate) -> Changes | None:
    optimizer = config.deepspeed["optimizer"]
    if _offloads(config) or str(optimizer.get("type")).lower() != "adamw":
        return None
    params = optimizer.get("params", {})
    taken = {key: value for key, value in params.items() if key in eight_bit.PARAMS}
    return {"deepspeed.optimizer": {"type": eight_bit.TYPE, "params": taken}}


def _offloads(config: Config) -> bool:
    zero = config.deepspeed.get("zero_optimization", {})
    return any(key in zero for key in ("offload_optimizer", "offload_param"))


def _offloaded(config: Config, _: Estimate) -> Changes | None:
    if "offload_optimizer" in config.deepspeed.get("zero_optimization", {}):
        return None
    found = _zero(config, stage=max(1, _stage(config)), offload_optimizer={"device": "cpu"})
    optimizer = config.deepspeed["optimizer"]
    if eight_bit.asks_for(optimizer):
        params = {**optimizer.get("params", {}), "torch_adam": True}
        found["deepspeed.optimizer"] = {"type": "AdamW", "params": params}
    # else DeepSpeed compiles an optimizer of its own
    return found | {"deepspeed.zero_force_ds_cpu_optimizer": False}


def _bfloat16(config: Config, _: Estimate) -> Changes | None:
    if engine_dtype(config.deepspeed) != torch.float32:
        return None
    half = {
        "model.dtype": "bfloat16",
        "deepspeed.bf16": {"enabled": True},
        "deepspeed.data_types": {"grad_accum_dtype": "fp32"},
    }
    return half | _zero(config, stage=max(1, _stage(config)))


def _quantized(config: Config, _: Estimate) -> Changes | None:
    fewer = {None: "8bit", "8bit": "4bit"}.get(config.model.quantize)
    return {"model.quantize": fewer} if fewer and config.model.lora else None


def propose(config: Config, judge: Judge, gpus: int) -> list[Step]:
    """The changes that make a run fit, in order; where none do, all that save something. Empty
    where it fits as it is.

    Args:
        config: of the run.
        judge: gives the estimate of a config, for the card in question.
        gpus: of the run.
    """
    before = judge(config)
    if before.fits:
        return []
    steps = list(_greedy(config, before, judge, options(gpus)))
    return _needed(config, steps, judge) if steps else []


def _greedy(
    config: Config, before: Estimate, judge: Judge, choices: list[Option]
) -> Iterator[Step]:
    """The first option that saves, again and again until the run fits: one that saves nothing may
    do so after another."""
    least = LEAST * (before.total - before.card)
    while not before.fits:
        for option in choices:
            changes = option.changes(config, before)
            made = _made(config, changes, judge)
            if made is not None and before.total - made[1].total >= least:
                config, before = made
                yield Step(changes, option.cost, before)  # type: ignore[arg-type]  # changes that were made are not None
                break
        else:
            return


def _made(config: Config, changes: Changes | None, judge: Judge) -> tuple[Config, Estimate] | None:
    """A config with some keys changed, and its estimate; None where there is nothing to change or
    the config does not allow it."""
    if changes is None:
        return None
    try:
        new = changed(config, changes)
        return new, judge(new)
    except UserError:
        return None


def changed(config: Config, changes: Changes) -> Config:
    """A config with other values of some dotted keys. UserError where they do not go together."""
    table = json.loads(config.model_dump_json())
    for key, value in changes.items():
        *folders, name = key.split(".")
        inner = table
        for folder in folders:
            inner = inner[folder]
        inner[name] = value
    return parse_config(table)


def _needed(config: Config, steps: list[Step], judge: Judge) -> list[Step]:
    """The same, each option once with its last value, and without those that the others made
    unnecessary, dearest first."""
    merged: dict[str, Changes] = {}
    for step in steps:
        merged[step.cost] = merged.get(step.cost, {}) | step.changes
    kept = [(changes, cost) for cost, changes in merged.items()]
    for choice in reversed(kept):
        others = [one for one in kept if one is not choice]
        without = _made(
            config, {key: value for changes, _ in others for key, value in changes.items()}, judge
        )
        if without and without[1].fits:
            kept = others
    made: Changes = {}
    found = []
    for changes, cost in kept:
        made |= changes
        found.append(Step(changes, cost, judge(changed(config, made))))
    return found
