"""What families share of their VAEs: encoding condition images, and the statistics of latents."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import torch

from tempflow.transfer import send


@contextmanager
def encoding_whole(vae: Any) -> Iterator[None]:
    """The VAE without tiles: they change what it makes of an image, and embeddings are the same
    whatever `model.vae_tiling` says."""
    before = vae.use_tiling
    vae.use_tiling = False
    try:
        yield
    finally:
        vae.use_tiling = before


def channel_statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of a video VAE's latents by channel, fp32 [1, C, 1, 1, 1]."""
    found = {
        "mean": torch.tensor(vae.config.latents_mean).reshape(1, -1, 1, 1, 1),
        "std": torch.tensor(vae.config.latents_std).reshape(1, -1, 1, 1, 1),
    }
    there = send([found], device)[0]
    return there["mean"], there["std"]
