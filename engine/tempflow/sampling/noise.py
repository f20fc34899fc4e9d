"""Keys of the counter-based noise: which 64-bit key belongs to which sample.

A key is a hash of what the sample is (run seed, iteration, prompt, seed index, step, child), so the same sample comes out
whatever the batch, the number of ranks or the device.
"""

from __future__ import annotations

import hashlib
import struct

import torch

INITIAL = -1  # the "step" of a row's initial noise


def noise_key(run_seed: int, iteration: int, prompt: int, seed: int, step: int, child: int) -> int:
    """A 64-bit key as a signed integer. prompt: index in the prompt file; step: `INITIAL` for the initial noise."""
    packed = struct.pack("<6q", run_seed, iteration, prompt, seed, step, child)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


def key_tensor(keys: list, device: torch.device | str) -> torch.Tensor:
    """int64 tensor of keys, nested lists as they come."""
    return torch.tensor(keys, dtype=torch.int64, device=device)
