"""Writes a safetensors file one tensor at a time, for weights that no process holds all at once.
The library's own writer takes all tensors together.

The format is a length (8 bytes, little-endian), a JSON header with the names, dtypes, shapes and
offsets, and the tensors' bytes: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Iterable

import torch

from tempflow.training import distributed

ALIGNMENT = 8  # bytes; readers map the file into memory, and the data begins after the header


def write_together(
    file: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """`write_safetensors` on rank 0, of tensors that all ranks must help to make (a collective)."""
    # Making a tensor is a collective, so the other ranks walk through all of them as well.
    if distributed.rank() == 0:
        write_safetensors(file, shapes, tensors)
    else:
        for _ in tensors:
            pass


def write_safetensors(
    file: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write fp32 tensors one by one, in the order of `shapes`.

    Args:
        file: where to write.
        shapes: of every tensor, by name.
        tensors: (name, fp32 tensor) pairs; each is written before the next one is asked for.

    Raises:
        ValueError: a tensor is missing, or its name, shape or dtype is not what `shapes` says.
    """
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 4 * torch.Size(shape).numel()  # 4 bytes an element
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
                    f"{file.name}: {name} {tuple(tensor.shape)} {tensor.dtype} is not the tensor"
                    " that the header lists next"
                )
            out.write(tensor.cpu().contiguous().numpy().data)
        if next(expected, None) is not None:
            raise ValueError(f"{file.name}: a tensor of the header is missing")
