"""A tiny FluxControlPipeline, and control images for it."""

from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import numpy as np
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from pipelines_flux import flux_pipeline

from tempflow.types import Size


def flux_control_pipeline(folder: Path, **options) -> Path:
    """As `flux_pipeline`, of twice the channels: latents and control."""
    return flux_pipeline(folder, kind="FluxControlPipeline", control=True, **options)


def control_images(size: Size) -> list[list[Image.Image]]:
    """A ramp and a disk, as a depth map has them, one of another size than the output."""
    rows, columns = np.ogrid[: size.height, : size.width]
    ramp = np.broadcast_to(columns / size.width, (size.height, size.width))
    disk = np.hypot(rows - size.height / 2, columns - size.width / 2) < size.height / 3
    levels = [(255 * (1 - 0.5 * part)).astype(np.uint8) for part in (ramp, disk)]
    images = [Image.fromarray(level).convert("RGB") for level in levels]
    return [[images[0]], [images[1].resize((size.width + 16, size.height + 8))]]


def of_the_mode() -> AbstractContextManager:
    """The pipeline draws its control latents; here it gets the most likely ones, as the policy
    does."""
    return mock.patch.object(
        DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mode()
    )
