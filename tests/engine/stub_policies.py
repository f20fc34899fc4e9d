"""A model family small enough to know what it must compute: it makes videos, and may be conditioned
on images."""

import numpy as np
import torch
from PIL import Image

from tempflow.models.guidance import GuidedPolicy

CELL = 8  # pixels a side of a latent pixel


class VideoPolicy(GuidedPolicy):
    """Latents [3, F, H / 8, W / 8], which the decoder repeats; an example's embedding is of its
    text and its condition images."""

    images_taken = (0, 1)

    def __init__(self):
        self.device, self.embedded = torch.device("cpu"), []
        self._denoiser = torch.nn.Identity()
        self._denoiser.dtype = torch.float32

    def denoiser(self):
        return self._denoiser

    @staticmethod
    def size_multiple(vae_config):
        return CELL

    @staticmethod
    def frame_step(vae_config):
        return 1

    def embed(self, examples):
        self.embedded += examples
        rows = [
            [len(e.text), *(pixels_of(image).mean() for image in e.images[:1] or [np.zeros(1)])]
            for e in examples
        ]
        return {"given": torch.tensor(rows, dtype=torch.float32)}

    def empty_embeddings(self, count):
        return {"given": torch.empty(count, 2)}

    def latent_shape(self, size):
        return 3, size.frames, size.height // CELL, size.width // CELL

    def sigmas(self, num_steps, size):
        return torch.linspace(1, 0, num_steps + 1)

    def _forward(self, denoiser, x, sigma, conditioning, size):
        return denoiser(0.1 * x)

    def _decode(self, latents, size):
        return latents.repeat_interleave(CELL, 3).repeat_interleave(CELL, 4)


def pixels_of(image) -> np.ndarray:
    return np.asarray(image if isinstance(image, np.ndarray) else Image.open(image))
