"""A safetensors file written one tensor at a time, for weights that no process holds together.

The format is a length (8 bytes, little-endian), a JSON header of names, dtypes, shapes and places,
and the tensors' bytes: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Iterable

import torch

from tempflow.training import distributed

ALIGNMENT = 8


def write_together(
    file: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """`write_safetensors` by the first rank, of tensors that all ranks must help to make (a
    collective)."""
    if distributed.rank() == 0:
        write_safetensors(file, shapes, tensors)
    else:
        for _ in tensors:
            pass


def write_safetensors(
    file: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write fp32 tensors as they come, in the order of `shapes`. ValueError where they are
    others."""
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        expected = iter(shapes.items())
        for name, tensor in tensors:
            if (name, tuple(tensor.shape)) != next(expected, None) or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{file.name}: {name} {tuple(tensor.shape)} {tensor.dtype} is not what comes"
                    " next"
                )
            out.write(tensor.cpu().contiguous().numpy().data)
        if next(expected, None) is not None:
            raise ValueError(f"{file.name}: a tensor is missing")
