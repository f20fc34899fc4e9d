"""The `deepspeed` section as DeepSpeed itself would read it, before any model is loaded.

Values go through DeepSpeed's own config classes, and a key that these never ask for is one that
DeepSpeed passes over in silence: both are refused. What those classes leave unchecked (the
optimizer, plain numbers, where to offload to) is checked here.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import torch
from pydantic import ValidationError

from tempflow import eight_bit
from tempflow.errors import UserError, shown

NUMBERS = ("gradient_clipping", "gradient_predivide_factor", "steps_per_print")
OPTIMIZER_NUMBERS = ("lr", "eps", "weight_decay", "momentum")


def check_deepspeed(section: dict) -> None:
    """UserError naming deepspeed.KEY. section: a config's, which `parse_config` has taken."""
    _check_optimizer(section["optimizer"])
    for key in NUMBERS:
        _check_number(f"deepspeed.{key}", section.get(key, 0))
    asked = _keys_asked_for(section)
    unknown = [key for key in section if key not in asked]
    if unknown:
        near = difflib.get_close_matches(unknown[0], asked, n=1)
        hint = (
            f"; did you mean {near[0]!r}?"
            if near
            else f". DeepSpeed reads {', '.join(sorted(asked))}"
        )
        raise UserError(f"{_name(unknown[0])}: unknown key{hint}")
    _check_offload(section.get("zero_optimization", {}), section["optimizer"])
    # with some it returns before the files are there to be sealed
    if (section.get("checkpoint") or {}).get("writer"):
        raise UserError(
            "deepspeed.checkpoint.writer: the engine needs DeepSpeed's own way to write; remove it"
        )


class _Watched(dict):
    """Notes which keys it is asked for."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked: set[str] = set()

    def __copy__(self):
        return self

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self  # `key in config.keys()` is a question too


def _keys_asked_for(section: dict) -> set[str]:
    try:
        return _read(section, None).asked
    except UserError:
        for key, value in section.items():  # the one that is wrong by itself, if there is one
            _read({key: value}, key)
        raise


def _read(values: dict, key: str | None) -> _Watched:
    """Let DeepSpeed read a section, or one key of it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    watched = _Watched({**values, "train_micro_batch_size_per_gpu": 1})
    name = _name(key) if key else "deepspeed"
    try:
        DeepSpeedConfig(watched)
    except ValidationError as error:
        first = error.errors()[0]
        where = _name(key or "", *(part for part in first["loc"] if part != key))
        raise UserError(
            f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, got {shown(first['input'])}"
        ) from None
    except Exception as error:  # whatever DeepSpeed's parsing runs into
        given = f", got {shown(values[key])}" if key else ""
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise UserError(f"{name}: DeepSpeed does not take it ({reason}){given}") from None
    return watched


def _name(*parts) -> str:
    """A key as users write it."""
    return ".".join(
        str(part) if str(part).isprintable() else repr(part)
        for part in ("deepspeed", *parts)
        if part != ""
    )


def _check_number(name: str, value) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value <= sys.float_info.max
    ):
        raise UserError(f"{name}: expected a number from 0 on, got {shown(value)}")


def _check_optimizer(table: dict) -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    kind, params = table.get("type"), table.get("params", {})
    of_torch = [
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and name not in ("Optimizer", "LBFGS")
    ]
    if (
        not isinstance(kind, str)
        or kind.lower() not in (*DEEPSPEED_OPTIMIZERS, eight_bit.TYPE.lower())
        and kind not in of_torch
    ):
        known = sorted({*of_torch, *DEEPSPEED_OPTIMIZERS, eight_bit.TYPE}, key=str.lower)
        raise UserError(
            f"deepspeed.optimizer.type: expected one of {', '.join(known)}, got {shown(kind)}"
        )
    if not isinstance(params, dict):
        raise UserError(f"deepspeed.optimizer.params: expected a table, got {shown(params)}")
    for key in OPTIMIZER_NUMBERS:
        _check_number(f"deepspeed.optimizer.params.{key}", params.get(key, 0))
    if eight_bit.asks_for(table):
        kind = "AdamW"  # takes the same values
        _check_params_of_eight_bit(params)
    # of the several that DeepSpeed chooses from, what they have in common
    if kind.lower() in ("adam", "adamw"):
        kind, params = (
            "AdamW",
            {
                key: value
                for key, value in params.items()
                if key in ("lr", "betas", "eps", "weight_decay")
            },
        )
    if kind in of_torch:
        try:
            getattr(torch.optim, kind)([torch.nn.Parameter(torch.zeros(2, 2))], **params)
        except Exception as error:  # TypeError, ValueError, IndexError: as the optimizer likes
            raise UserError(f"deepspeed.optimizer.params: {error}") from None


def _check_params_of_eight_bit(params: dict) -> None:
    unknown = [key for key in params if key not in eight_bit.PARAMS]
    if unknown:
        raise UserError(
            f"deepspeed.optimizer.params.{unknown[0]}: {eight_bit.TYPE} takes"
            f" {', '.join(eight_bit.PARAMS)}"
        )


def _check_offload(zero: dict, optimizer: dict) -> None:
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        table, name = zero.get(key) or {}, f"deepspeed.zero_optimization.{key}"
        if table.get("device", "none") == "none":
            continue
        if zero.get("stage", 0) not in stages:
            raise UserError(
                f"{name}: DeepSpeed passes it over at stage {zero.get('stage', 0)}; it needs"
                f" {' or '.join(map(str, stages))}"
            )
        if eight_bit.asks_for(optimizer):
            raise UserError(
                f"{name}: {eight_bit.TYPE} updates where the weights are; set the device to"
                ' "none", or take AdamW'
            )
        if table["device"] == "nvme" and not table.get("nvme_path"):
            raise UserError(f"{name}.nvme_path: missing; a folder on the NVMe disk is needed")


def check_machine(section: dict) -> None:
    """UserError where the section asks for what this machine cannot do; DeepSpeed would fail with a
    traceback, a model later."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if eight_bit.asks_for(section.get("optimizer", {})):
        eight_bit.check_library()
    for key in ("offload_optimizer", "offload_param"):
        table, name = (
            section.get("zero_optimization", {}).get(key) or {},
            f"deepspeed.zero_optimization.{key}",
        )
        if table.get("device") != "nvme":
            continue
        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                f'{name}.device: "nvme" needs DeepSpeed\'s async_io, which cannot be built here;'
                ' install the headers of libaio (Debian: libaio-dev), or take "cpu"'
            )
        if not Path(table["nvme_path"]).is_dir():
            raise UserError(f"{name}.nvme_path: no folder {table['nvme_path']}")
