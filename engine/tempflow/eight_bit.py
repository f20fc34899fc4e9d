"""AdamW whose state is kept in 8 bit: bitsandbytes' AdamW8bit, named by `deepspeed.optimizer`.

bitsandbytes steps on CUDA and, from 0.50 on, on the CPU, without a compiler; torchao's optimizer of
the same name compiles its step and wants the learning rate as a tensor, which DeepSpeed would
replace by a number. DeepSpeed knows neither, so it is given the optimizer itself.
"""

from __future__ import annotations

import importlib
from typing import Callable, Iterable, Iterator

from tempflow.errors import UserError

TYPE = "AdamW8bit"
PARAMS = ("lr", "betas", "eps", "weight_decay")
INSTALL = "pip install 'bitsandbytes>=0.50', the extra quantize"
BLOCK, LEAST = 256, 4096  # bitsandbytes': elements that share a scale; those of a tensor in 8 bit
# Elements of a parameter group. DeepSpeed makes one tensor of each, and bitsandbytes counts a
# tensor's elements in 32 bit.
LONGEST = 1 << 30


def asks_for(optimizer: dict) -> bool:
    """Whether the table `deepspeed.optimizer` names it."""
    return str(optimizer.get("type")).lower() == TYPE.lower()


def check_library() -> None:
    """UserError where bitsandbytes cannot be imported."""
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:  # it loads a library of its own, which may fail in any way
        raise UserError(
            f"deepspeed.optimizer.type: {TYPE} needs the package bitsandbytes, which cannot be"
            f" imported ({' '.join(str(error).split()):.200}): {INSTALL}"
        ) from None


def maker(optimizer: dict) -> Callable | None:
    """What makes the optimizer of parameters, for `deepspeed.initialize`; None where DeepSpeed
    makes it itself."""
    if not asks_for(optimizer):
        return None
    check_library()
    from bitsandbytes.optim import AdamW8bit

    params = optimizer.get("params", {})
    return lambda parameters: AdamW8bit(
        [{"params": group} for group in groups(parameters)], **params
    )


def groups(parameters: Iterable) -> Iterator[list]:
    """Consecutive parameters, at most `LONGEST` elements together or one alone."""
    group: list = []
    size = 0
    for parameter in parameters:
        elements = getattr(parameter, "ds_numel", parameter.numel())
        if group and size + elements > LONGEST:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += elements
    if group:
        yield group


def state_bytes(elements: int) -> int:
    """Of both moments of a tensor, with the scales of their blocks."""
    if elements < LEAST:
        return 2 * 4 * elements
    return 2 * (elements + 4 * -(-elements // BLOCK))
