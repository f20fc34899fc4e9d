"""Encoding condition images, for families that edit."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator


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
