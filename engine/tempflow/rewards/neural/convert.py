"""Converts pickled weights to safetensors: `python -m tempflow.rewards.neural.convert IN.pt
OUT.safetensors`.

The engine never loads pickled weights, because unpickling can run code. This command, which a user
starts, is the exception. It uses torch's restricted unpickler (`weights_only=True`), which builds
tensors and plain containers and refuses everything else. Names and values of the tensors do not
change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tempflow.errors import UserError


def convert(source: Path, target: Path) -> int:
    """Convert one checkpoint.

    Args:
        source: a pickled dictionary of tensors, which may be under "state_dict" or "model".
        target: the .safetensors file to write.

    Returns:
        The number of tensors.

    Raises:
        UserError: for a file that is not such a checkpoint.
    """
    from safetensors.torch import save_file

    if target.suffix != ".safetensors":
        raise UserError(f"the output must be named *.safetensors, got {target}")
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and file errors of many types
        raise UserError(
            f"{source} cannot be read as a checkpoint of plain tensors: {type(error).__name__}:"
            f" {error}"
        ) from None
    for name in ("state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(name), dict):
            checkpoint = checkpoint[name]
    held = checkpoint.items() if isinstance(checkpoint, dict) else ()
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        name: value.detach().clone().contiguous()
        for name, value in held
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise UserError(f"{source} holds no dictionary of tensors")
    # Renamed at the end, so that an interrupted run leaves no file that looks complete.
    partial = target.with_name(target.name + ".part")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(target)
    return len(tensors)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tempflow.rewards.neural.convert",
        description="Convert pickled weights to safetensors.",
    )
    parser.add_argument("source", type=Path, help="a .pt, .pth, .ckpt or .bin file")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    options = parser.parse_args(arguments)
    try:
        count = convert(options.source, options.target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.target}: {count} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
