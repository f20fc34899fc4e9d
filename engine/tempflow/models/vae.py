"""What families share about their VAEs: encoding condition images, and statistics of latents."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import torch

from tempflow.transfer import send


@contextmanager
def encoding_whole(vae: Any) -> Iterator[None]:
    """Inside the context, the VAE does not encode in tiles. Tiles change its result a little, and
    embeddings must not depend on `model.vae_tiling`."""
    before = vae.use_tiling
    vae.use_tiling = False
    try:
        yield
    finally:
        vae.use_tiling = before


def channel_statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of a video VAE's latents by channel, fp32 [1, C, 1, 1, 1]."""
    # Both in one pinned copy, for which the host does not wait.
    found = {
        "mean": torch.tensor(vae.config.latents_mean).reshape(1, -1, 1, 1, 1),
        "std": torch.tensor(vae.config.latents_std).reshape(1, -1, 1, 1, 1),
    }
    there = send([found], device)[0]
    return there["mean"], there["std"]
