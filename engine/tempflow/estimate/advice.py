"""Which keys make a run smaller: candidates, each a config of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Iterator

from tempflow.config import Config, parse_config
from tempflow.errors import UserError

CANDIDATES: list[tuple[str, dict]] = [
    ('model.lora={"rank": 32, "alpha": 64}', {"model.lora": {"rank": 32, "alpha": 64.0}}),
    ("model.gradient_checkpointing=true", {"model.gradient_checkpointing": True}),
    ("training.micro_batch=1", {"training.micro_batch": 1}),
    ("rollout.micro_batch=1", {"rollout.micro_batch": 1}),
    ("rollout.suffix.weights=same", {"rollout.suffix.weights": "same"}),
    ("rollout.graphs=false", {"rollout.graphs": False}),
    ("rollout.decode_batch=1", {"rollout.decode_batch": 1}),
    ("deepspeed.zero_optimization.stage=2", {"deepspeed.zero_optimization.stage": 2}),
    ("deepspeed.zero_optimization.stage=3", {"deepspeed.zero_optimization.stage": 3}),
    ('deepspeed.zero_optimization.offload_optimizer={"device": "cpu"}',
     {"deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"}}),
    ("rollout.replica=false", {"rollout.replica": False, "rollout.graphs": False, "rollout.compile": "eager"}),
    ("reward_pool.workers=1", {"reward_pool.workers": 1}),
    ("training.penalty=null", {"training.penalty": None}),
    ("training.reference=offloaded", {"training.reference": "offloaded"}),
    ("model.dtype=bfloat16", {"model.dtype": "bfloat16"}),
    ('deepspeed.bf16={"enabled": true}', {"deepspeed.bf16": {"enabled": True}}),
    ("data.embedding_cache=embeddings", {"data.embedding_cache": "embeddings"}),
    ("data.prompts_per_iteration=1", {"data.prompts_per_iteration": 1}),
]  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """A change, the bytes that it saves on each GPU by itself, and whether the run then fits."""

    setting: str
    bytes: int
    fits: bool


def changes(config: Config) -> Iterator[tuple[str, Config]]:
    """(setting, config with it) for the candidates that change something for the smaller and that the config's checks allow."""
    before = json.loads(config.model_dump_json())
    for setting, values in CANDIDATES:
        if not _smaller(before, values):
            continue
        table = json.loads(config.model_dump_json())
        for key, value in values.items():
            _set(table, key, value)
        if table == before:
            continue
        try:
            yield setting, parse_config(table)
        except UserError:
            continue


def _smaller(table: dict, values: dict) -> bool:
    """Not another rank for adapters that are there, nor another cache, nor weights of a suffix that is not there, nor a lower
    ZeRO stage, nor offloading without one."""
    stage = table["deepspeed"].get("zero_optimization", {}).get("stage", 0)
    if "model.lora" in values:
        return table["model"]["lora"] is None
    if "rollout.suffix.weights" in values:
        return table["rollout"]["suffix"] is not None
    if "data.embedding_cache" in values:
        return table["data"]["embedding_cache"] is None
    if "deepspeed.zero_optimization.offload_optimizer" in values:
        return stage > 0
    return values.get("deepspeed.zero_optimization.stage", 3) >= stage


def _set(table: dict, key: str, value) -> None:
    *sections, name = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
    table[name] = value
