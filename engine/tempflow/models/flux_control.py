"""FLUX.1 Depth and Canny: FLUX.1 that follows a control image, such as a depth map or edges.

The prompt's condition image is the finished control image; nothing is detected here. It is scaled
to the size of the output, its VAE latents are packed like those of the output, and both are joined
along the channels in every forward, so a row has as many tokens as without control. diffusers
samples these latents from the VAE's posterior. Here they are its mode, so that a prompt has the
same conditioning in every forward, in the embedding cache and after a resume.
"""

from __future__ import annotations

import torch

from tempflow.media import condition_image
from tempflow.models.base import Conditioning
from tempflow.models.flux import FluxPolicy
from tempflow.models.vae import encoding_whole
from tempflow.types import Example, Size

CONTROL = "control_latents"  # name in the conditioning; packed like latents, [n, tokens, channels]


class FluxControlPolicy(FluxPolicy):
    """Velocities of a FluxTransformer2DModel with a control image, with the same inputs as in
    FluxControlPipeline."""

    images_taken = (1, 1)
    embeds_with = ("vae",)
    sized = True
    # x_embedder is the layer through which the control image enters.
    lora_targets: tuple[str, ...] = ("x_embedder", *FluxPolicy.lora_targets)

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        return super().embed(examples) | {
            CONTROL: torch.cat([self._control_latents(example) for example in examples])
        }

    def _control_latents(self, example: Example) -> torch.Tensor:
        """The control latents of one example, [1, tokens, channels]."""
        # One image at a time, because another one in the VAE's batch would change the last bits.
        assert self.size  # set by `embedding_for`
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
        assert self.size  # set by `embedding_for`
        control = torch.empty(
            count, *self.latent_shape(self.size), dtype=self.dtype, device=self.device
        )
        return super().empty_embeddings(count) | {CONTROL: control}

    def latent_shape(self, size: Size) -> tuple[int, int]:
        # Half of the transformer's input channels are the control image's.
        tokens, channels = super().latent_shape(size)
        return tokens, channels // 2

    def _image_inputs(
        self, x: torch.Tensor, conditioning: Conditioning, size: Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, ids = super()._image_inputs(x, conditioning, size)
        return torch.cat([tokens, conditioning[CONTROL].to(x.dtype)], dim=2), ids
