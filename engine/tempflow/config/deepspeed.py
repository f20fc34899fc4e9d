"""Check the `deepspeed` section as DeepSpeed would read it, before any model is loaded.

DeepSpeed's own config classes read the values. A key that they never ask for would be ignored
silently, so it is refused. This module checks what those classes do not: the optimizer, plain
numbers and where to offload to.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import torch
from pydantic import ValidationError

from tempflow import eight_bit
from tempflow.errors import UserError, shown

# DeepSpeed's classes take any value for these.
NUMBERS = ("gradient_clipping", "gradient_predivide_factor", "steps_per_print")
OPTIMIZER_NUMBERS = ("lr", "eps", "weight_decay", "momentum")


def check_deepspeed(section: dict) -> None:
    """Check a section that `parse_config` has accepted.

    Raises:
        UserError: names deepspeed.KEY, the value that came and what is allowed.
    """
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
    # Some writers return before their files are complete, and the engine then computes checksums of
    # the files.
    if (section.get("checkpoint") or {}).get("writer"):
        raise UserError(
            "deepspeed.checkpoint.writer: is not allowed; the engine needs DeepSpeed's default"
            " writer; remove the key"
        )


class _Watched(dict):
    """A dict that records which keys it is asked for."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked: set[str] = set()

    # DeepSpeedConfig reads from a copy of what it is given, which would record elsewhere.
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
        return self  # so that `key in config.keys()` is recorded too


def _keys_asked_for(section: dict) -> set[str]:
    """The keys that DeepSpeed asks for when it reads a section. Raises UserError."""
    try:
        return _read(section, None).asked
    except UserError:
        # DeepSpeed's message may name no key. Read each key alone to find the wrong one; if each is
        # right by itself, the message about all of them stays.
        for key, value in section.items():
            _read({key: value}, key)
        raise


def _read(values: dict, key: str | None) -> _Watched:
    """Let DeepSpeed read a section, or one key of it. Raises UserError."""
    from deepspeed.runtime.config import DeepSpeedConfig

    # DeepSpeed requires a batch size, which the engine sets later.
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
    except Exception as error:
        # DeepSpeed's parsing asserts, indexes and converts without checks, so any type may come.
        given = f", got {shown(values[key])}" if key else ""
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise UserError(f"{name}: DeepSpeed refuses it ({reason}){given}") from None
    return watched


def _name(*parts) -> str:
    """A dotted key as users write it; empty parts are left out."""
    return ".".join(
        str(part) if str(part).isprintable() else repr(part)
        for part in ("deepspeed", *parts)
        if part != ""
    )


def _check_number(name: str, value) -> None:
    # The comparison also refuses NaN, infinity and integers beyond float's range.
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value <= sys.float_info.max
    ):
        raise UserError(f"{name}: expected a number from 0 on, got {shown(value)}")


def _check_optimizer(table: dict) -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    kind, params = table.get("type"), table.get("params", {})
    # DeepSpeed looks other types up in torch.optim. LBFGS needs a closure, which it does not pass.
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
        _check_params_of_eight_bit(params)
        kind = "AdamW"  # the same values are allowed
    # For Adam DeepSpeed chooses among several classes by further parameters. Check those that all
    # of the classes have.
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
        # Make the optimizer of one small weight. It is a matrix because some (Muon) refuse vectors.
        try:
            getattr(torch.optim, kind)([torch.nn.Parameter(torch.zeros(2, 2))], **params)
        except Exception as error:  # TypeError, ValueError or IndexError, by optimizer
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
                f"{name}: DeepSpeed ignores it at ZeRO stage {zero.get('stage', 0)}; it needs stage"
                f" {' or '.join(map(str, stages))}"
            )
        if eight_bit.asks_for(optimizer):
            raise UserError(
                f"{name}: is not allowed with the optimizer {eight_bit.TYPE}, which updates weights"
                ' on their own device; set the device to "none", or use AdamW'
            )
        if table["device"] == "nvme" and not table.get("nvme_path"):
            raise UserError(f"{name}.nvme_path: required, but missing: a folder on the NVMe disk")


def check_machine(section: dict) -> None:
    """Check what the section needs of this machine.

    DeepSpeed would fail with a traceback, after the model was loaded.

    Raises:
        UserError: bitsandbytes or libaio is missing, or nvme_path is no folder.
    """
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
                f'{name}.device: "nvme" needs DeepSpeed\'s async_io, which cannot be built on this'
                ' machine; install the headers of libaio (Debian: libaio-dev), or use "cpu"'
            )
        if not Path(table["nvme_path"]).is_dir():
            raise UserError(f"{name}.nvme_path: no folder {table['nvme_path']}")
