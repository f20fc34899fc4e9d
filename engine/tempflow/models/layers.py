"""Which linear layers of a transformer see every token: those where most of its weights and of its
operations are, and that bear fewer bits. Modulations act on one vector a row; there fewer bits
would cost accuracy and save no time."""

from __future__ import annotations

import re
from typing import Iterator

import torch

_MODULATION = re.compile(r"(^|\.)(norm[^.]*|[^.]*mod|[^.]*modulation)(\.|$)")


def token_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of the repeated blocks that see every token, by name."""
    blocks = tuple(block_lists(transformer))
    return {
        name: part
        for name, part in transformer.named_modules()
        if isinstance(part, torch.nn.Linear)
        and name.startswith(blocks)
        and not _MODULATION.search(name)
    }


def block_lists(module: torch.nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the lists of modules that lie in no other one."""
    for name, part in module.named_children():
        if isinstance(part, torch.nn.ModuleList):
            yield f"{prefix}{name}."
        else:
            yield from block_lists(part, f"{prefix}{name}.")
