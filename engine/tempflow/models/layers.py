"""Finds the linear layers of a transformer that process every token.

They hold most of the weights and do most of the operations, so they are the layers that are
quantized. Modulation layers are left out: they process one vector per row, so fewer bits would cost
accuracy and save no time.
"""

from __future__ import annotations

import re
from typing import Iterator

import torch

# Parts of module names that mark modulation layers in the families here: "norm1", "img_mod",
# "adaLN_modulation" and the like.
_MODULATION = re.compile(r"(^|\.)(norm[^.]*|[^.]*mod|[^.]*modulation)(\.|$)")


def token_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers in a transformer's repeated blocks that process every token, by name."""
    # Those outside the blocks (embedders, the last projection) are a small share of the weights.
    blocks = tuple(block_lists(transformer))
    return {
        name: part
        for name, part in transformer.named_modules()
        if isinstance(part, torch.nn.Linear)
        and name.startswith(blocks)
        and not _MODULATION.search(name)
    }


def block_lists(module: torch.nn.Module, prefix: str = "") -> Iterator[str]:
    """Name prefixes, such as "transformer_blocks.", of all module lists that are in no other
    list."""
    for name, part in module.named_children():
        if isinstance(part, torch.nn.ModuleList):
            yield f"{prefix}{name}."
        else:
            yield from block_lists(part, f"{prefix}{name}.")
