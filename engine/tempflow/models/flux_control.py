"""FLUX.1 Depth and Canny: FLUX.1 that draws to a control image, such as a depth or edge map, which
the prompt brings ready-made.

The control image is scaled to the size of the output. The VAE's latents of it are packed as those
of the output are, and stand beside them in the channels of every forward, so a row has as many
tokens as without control. diffusers draws them from the VAE's posterior; here they are its mode, so
that a prompt's conditioning is the same in every forward of it, in the embedding cache and after a
resume.
"""

from __future__ import annotations

import torch

from tempflow.media import condition_image
from tempflow.models.base import Conditioning
from tempflow.models.flux import FluxPolicy
from tempflow.models.vae import encoding_whole
from tempflow.types import Example, Size

CONTROL = "control_latents"  # of the conditioning: [n, tokens, channels], as packed latents


class FluxControlPolicy(FluxPolicy):
    """Velocities of a FluxTransformer2DModel under a control image, as FluxControlPipeline asks for
    them."""

    images_taken = (1, 1)
    embeds_with = ("vae",)
    sized = True
    lora_targets: tuple[str, ...] = ("x_embedder", *FluxPolicy.lora_targets)

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        return super().embed(examples) | {
            CONTROL: torch.cat([self._control_latents(example) for example in examples])
        }

    def _control_latents(self, example: Example) -> torch.Tensor:
        """[1, tokens, channels], of one image alone: another beside it would show in its last
        bits."""
        assert self.size  # `embedding_for` sets it
        vae, (rows, columns) = self.pipe.vae, self._packed_size(self.size)
        pixels = self.pipe.image_processor.preprocess(
            condition_image(example.images[0]), self.size.height, self.size.width
        )
        with encoding_whole(vae):
            latents = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        # [1, channels, rows, 2, columns, 2]
        patches = latents.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(1, rows * columns, -1)

    def empty_embeddings(self, count: int) -> Conditioning:
        assert self.size  # `embedding_for` sets it
        control = torch.empty(
            count, *self.latent_shape(self.size), dtype=self.dtype, device=self.device
        )
        return super().empty_embeddings(count) | {CONTROL: control}

    def latent_shape(self, size: Size) -> tuple[int, int]:
        tokens, channels = super().latent_shape(size)
        return tokens, channels // 2

    def _image_inputs(
        self, x: torch.Tensor, conditioning: Conditioning, size: Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, ids = super()._image_inputs(x, conditioning, size)
        return torch.cat([tokens, conditioning[CONTROL].to(x.dtype)], dim=2), ids
