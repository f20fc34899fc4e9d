"""AdamW with moments in 8 bit: the type AdamW8bit of `deepspeed.optimizer`, from bitsandbytes.

bitsandbytes runs on CUDA and, from version 0.50 on, on the CPU, without a compiler. torchao has an
optimizer of the same name, but compiles its step and requires the learning rate as a tensor, which
DeepSpeed would replace by a number. DeepSpeed knows neither type, so it gets the optimizer itself
(a client optimizer).
"""

from __future__ import annotations

import importlib
from typing import Callable, Iterable, Iterator

from tempflow.errors import UserError

TYPE = "AdamW8bit"
PARAMS = ("lr", "betas", "eps", "weight_decay")
INSTALL = "pip install 'bitsandbytes>=0.50', the extra quantize"
# bitsandbytes' constants: elements that share a scale, and elements from which on a tensor's state
# is kept in 8 bit.
BLOCK, LEAST = 256, 4096
# Most elements of a parameter group. DeepSpeed flattens each group into one tensor, and
# bitsandbytes' kernels count a tensor's elements in 32 bit.
LONGEST = 1 << 30


def asks_for(optimizer: dict) -> bool:
    """Whether the table `deepspeed.optimizer` asks for this optimizer, in any case of letters."""
    return str(optimizer.get("type")).lower() == TYPE.lower()


def check_library() -> None:
    """Raise UserError if bitsandbytes cannot be imported."""
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:
        # Not only ImportError: it loads a native library, which may fail in any way.
        raise UserError(
            f"deepspeed.optimizer.type: {TYPE} needs the package bitsandbytes, which cannot be"
            f" imported ({' '.join(str(error).split()):.200}): {INSTALL}"
        ) from None


def maker(optimizer: dict) -> Callable | None:
    """A function from parameters to the optimizer, for `deepspeed.initialize`.

    Args:
        optimizer: the table `deepspeed.optimizer`.

    Returns:
        None if the table names another type, which DeepSpeed makes itself.
    """
    if not asks_for(optimizer):
        return None
    check_library()
    from bitsandbytes.optim import AdamW8bit

    # A function, because DeepSpeed calls it with the parameters that it has prepared.
    params = optimizer.get("params", {})
    return lambda parameters: AdamW8bit(
        [{"params": group} for group in groups(parameters)], **params
    )


def groups(parameters: Iterable) -> Iterator[list]:
    """Groups of consecutive parameters, of at most `LONGEST` elements or one parameter each."""
    group: list = []
    size = 0
    for parameter in parameters:
        # At ZeRO stage 3 a partitioned parameter has no elements; ds_numel is its whole size.
        elements = getattr(parameter, "ds_numel", parameter.numel())
        if group and size + elements > LONGEST:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += elements
    if group:
        yield group


def state_bytes(elements: int) -> int:
    """Bytes of both moments of a tensor, with an fp32 scale for each block."""
    if elements < LEAST:
        return 2 * 4 * elements
    return 2 * (elements + 4 * -(-elements // BLOCK))
