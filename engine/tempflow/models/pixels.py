"""From what a VAE decodes to uint8 images or videos, on the device."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, ContextManager

import torch

# A rollout's lanes are threads, and VAEs of videos keep features of the last frames in themselves
# while they decode: two threads in one such VAE would mix their frames.
_ONE_AT_A_TIME = threading.Lock()


def decoding(vae: Any) -> ContextManager:
    """What a decode holds: a lock for a VAE with a cache of features, nothing for the others."""
    return _ONE_AT_A_TIME if hasattr(vae, "clear_cache") else nullcontext()


def finite_pixels(
    latents: torch.Tensor, decoded: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The uint8 images of decoded latents, and which of them are finite.

    Args:
        latents: final latents, [n, ...].
        decoded: what the VAE made of them, about in [-1, 1]: images [n, 3, H, W] or videos
            [n, 3, F, H, W].

    Returns:
        uint8 [n, H, W, 3] or [n, F, H, W, 3], and bool [n]: False where a latent or its decoded
        values hold NaN or infinity. Both stay on the device.
    """
    finite = latents.isfinite().flatten(1).all(1) & decoded.isfinite().flatten(1).all(1)
    # One by one, because the fp32 copy of a whole batch of videos needs four times its memory.
    return torch.stack([_as_bytes(one) for one in decoded]), finite


def _as_bytes(decoded: torch.Tensor) -> torch.Tensor:
    """The uint8 image [H, W, 3] or video [F, H, W, 3] of [3, ..., H, W] in about [-1, 1]."""
    # The arithmetic of diffusers' image and video processors, so that the bytes equal theirs.
    pixels = torch.nan_to_num(decoded.float()) * 0.5 + 0.5
    return pixels.clamp_(0, 1).mul_(255).round_().to(torch.uint8).movedim(0, -1)
