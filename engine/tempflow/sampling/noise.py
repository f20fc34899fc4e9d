"""Keys of the counter-based noise: which 64-bit key belongs to which sample.

A key is a hash of what the sample is (run seed, iteration, prompt, seed index, step, path), so the
same sample comes out whatever the batch, the number of ranks or the device.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch

from tempflow.transfer import send_one
from tempflow.types import Unit
from tempflow_kernels import normal

INITIAL = -1  # the "step" of a row's initial noise
AFTERWARDS = -2  # and of noise that an objective adds to finished latents: this one and below


def noise_key(
    run_seed: int, iteration: int, prompt: int, seed: int, step: int, path: tuple[int, ...] = ()
) -> int:
    """A 64-bit key as a signed integer. prompt: index in the prompt file; step: `INITIAL` for the
    initial noise."""
    # what is no branch shares its keys with branch 0, and so with none that takes noise at its step
    parts = path or (0,)
    packed = struct.pack(f"<{5 + len(parts)}q", run_seed, iteration, prompt, seed, step, *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


def key_tensor(keys: list, device: torch.device | str) -> torch.Tensor:
    """int64 tensor of keys, nested lists as they come."""
    return send_one(torch.tensor(keys, dtype=torch.int64), device)


@dataclass(frozen=True)
class Noise:
    """The noise of one iteration of a run."""

    run_seed: int
    iteration: int

    def key(self, unit: Unit, step: int, path: tuple[int, ...] = ()) -> int:
        """The key of a sample of a unit."""
        return noise_key(self.run_seed, self.iteration, unit.prompt_id, unit.seed, step, path)

    def sample(
        self, keys: list[int], shape: tuple[int, ...], device: torch.device | str
    ) -> torch.Tensor:
        """Standard normals, fp32 [n, *shape]."""
        return normal(key_tensor(keys, device), torch.Size(shape).numel()).reshape(
            len(keys), *shape
        )
