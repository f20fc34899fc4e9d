"""Makes safetensors of pickled weights: `python -m tempflow.rewards.neural.convert IN.pt
OUT.safetensors`.

Pickles are opened here alone, by hand, and by torch's restricted unpickler (`weights_only=True`),
which builds tensors and plain containers and refuses everything else. Names and values of the
tensors stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tempflow.errors import UserError


def convert(source: Path, target: Path) -> int:
    """Write the tensors of the checkpoint `source` to `target`; the number of tensors.

    A checkpoint is a dictionary of tensors, or has one under "state_dict" or "model". Raises
    `UserError` for anything else.
    """
    from safetensors.torch import save_file

    if target.suffix != ".safetensors":
        raise UserError(f"the output must be named *.safetensors, got {target}")
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and file errors of many types
        raise UserError(
            f"{source} cannot be read as plain tensors: {type(error).__name__}: {error}"
        ) from None
    for name in ("state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(name), dict):
            checkpoint = checkpoint[name]
    held = checkpoint.items() if isinstance(checkpoint, dict) else ()
    # Clones: safetensors stores no two tensors of one storage.
    tensors = {
        name: value.detach().clone().contiguous()
        for name, value in held
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise UserError(f"{source} holds no dictionary of tensors")
    partial = target.with_name(target.name + ".part")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(target)
    return len(tensors)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tempflow.rewards.neural.convert",
        description="Make safetensors of pickled weights.",
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
