"""Keys of the counter-based noise: the 64-bit key of each sample.

A key is a hash of what identifies the sample (run seed, iteration, prompt, seed, step, path), so a
sample depends neither on its batch nor on the number of ranks or the device. Nothing draws from
torch's global generator.
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
# The first "step" of noise that an objective adds to finished latents; further ones are below it.
AFTERWARDS = -2


def noise_key(
    run_seed: int, iteration: int, prompt: int, seed: int, step: int, path: tuple[int, ...] = ()
) -> int:
    """The key of a sample, a signed 64-bit integer.

    Args:
        run_seed: of the run.
        iteration: in which the sample is drawn.
        prompt: index of the prompt in its file.
        seed: number of the initial noise of that prompt.
        step: of the grid, or `INITIAL`.
        path: identifies a branch among its siblings; empty for a row that is no branch.
    """
    # A row that is no branch shares its keys with branch 0. They never meet: where such a row takes
    # noise at a step, plans number the branches that leave it there from 1.
    parts = path or (0,)
    # The format of the bytes is part of every recorded result: another one is other noise.
    packed = struct.pack(f"<{5 + len(parts)}q", run_seed, iteration, prompt, seed, step, *parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


def key_tensor(keys: list, device: torch.device | str) -> torch.Tensor:
    """An int64 tensor of keys on a device, shaped like the nested lists."""
    return send_one(torch.tensor(keys, dtype=torch.int64), device)


@dataclass(frozen=True)
class Noise:
    """The noise of one iteration of a run."""

    run_seed: int
    iteration: int

    def key(self, unit: Unit, step: int, path: tuple[int, ...] = ()) -> int:
        """The key of a sample of a unit, as `noise_key`."""
        return noise_key(self.run_seed, self.iteration, unit.prompt_id, unit.seed, step, path)

    def sample(
        self, keys: list[int], shape: tuple[int, ...], device: torch.device | str
    ) -> torch.Tensor:
        """Standard normal samples of n keys, fp32 [n, *shape]."""
        return normal(key_tensor(keys, device), torch.Size(shape).numel()).reshape(
            len(keys), *shape
        )
