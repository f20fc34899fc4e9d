"""FLUX.1-Kontext: FLUX.1 that edits one condition image, whose tokens the transformer also sees.

The image is scaled to the preferred resolution of the pipeline, all about a megapixel, with the
nearest aspect ratio, and encoded to the mode of the VAE. Its tokens follow those of the latents,
with another first position id; the transformer's predictions for them are dropped. They do not
depend on the output and are part of the prompt's embedding.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers.pipelines.flux import pipeline_flux_kontext

from tempflow.errors import UserError
from tempflow.media import condition_image
from tempflow.models.base import Conditioning
from tempflow.models.flux import FluxPolicy, image_ids
from tempflow.models.vae import encoding_whole
from tempflow.types import Example, Size

IMAGE = "image_tokens"  # name in the conditioning, [n, rows, columns, channels]
OF_IMAGE = 1  # first position id of the image's tokens; latents and text have 0


@lru_cache(maxsize=16)
def both_ids(
    latents: tuple[int, int], image: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Position ids [tokens, 3] of the latents' tokens and, after them, the image's. The first two
    arguments are the rows and columns of each; cached like `image_ids`."""
    of_latents, of_image = (image_ids(*grid, device, dtype) for grid in (latents, image))
    number = torch.full_like(of_image[:, :1], OF_IMAGE)
    return torch.cat([of_latents, torch.cat([number, of_image[:, 1:]], dim=1)])


def preferred_size(width: int, height: int) -> tuple[int, int]:
    """The (width, height) in pixels to which the pipeline scales an image: that of the nearest
    aspect ratio."""
    _, wide, high = min(
        (abs(width / height - w / h), w, h)
        for w, h in pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    )
    return wide, high


class FluxKontextPolicy(FluxPolicy):
    """Velocities of a FluxTransformer2DModel that edits an image, with the same inputs as in
    FluxKontextPipeline."""

    ragged = True  # images of different aspect ratios have different grids of tokens
    images_taken = (1, 1)
    embeds_with = ("vae",)

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        (example,) = examples
        return super().embed(examples) | {IMAGE: self._image_tokens(example)}

    def _image_tokens(self, example: Example) -> torch.Tensor:
        pipe, multiple = self.pipe, self.size_multiple(self.pipe.vae.config)
        image = condition_image(example.images[0])
        if min(image.size) < multiple:
            raise UserError(
                f"a condition image of {image.width} x {image.height} pixels is too small: each"
                f" side needs at least {multiple}"
            )
        # Rounded down to multiples first, as in the pipeline: it can decide between two ratios.
        height, width = pipe.image_processor.get_default_height_width(image)
        width, height = (side // multiple * multiple for side in preferred_size(width, height))
        pixels = pipe.image_processor.preprocess(
            pipe.image_processor.resize(image, height, width), height, width
        )
        with encoding_whole(pipe.vae):
            _, tokens, _, _ = pipe.prepare_latents(
                image=pixels,
                batch_size=1,
                num_channels_latents=pipe.latent_channels,
                height=height,
                width=width,
                dtype=pipe.vae.dtype,
                device=self.device,
                latents=torch.empty(0),  # else the pipeline would draw noise for them
            )
        return tokens.unflatten(1, (height // multiple, width // multiple))

    def empty_embeddings(self, count: int) -> Conditioning:
        multiple, channels = (
            self.size_multiple(self.pipe.vae.config),
            self.pipe.transformer.config.in_channels,
        )
        grid = max(
            (
                (h // multiple, w // multiple)
                for w, h in pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
            ),
            key=lambda grid: grid[0] * grid[1],
        )
        return super().empty_embeddings(count) | {
            IMAGE: torch.empty(count, *grid, channels, dtype=self.dtype, device=self.device)
        }

    def _image_inputs(
        self, x: torch.Tensor, conditioning: Conditioning, size: Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image = conditioning[IMAGE]
        ids = both_ids(self._packed_size(size), tuple(image.shape[1:3]), x.device, x.dtype)
        return torch.cat([x, image.to(x.dtype).flatten(1, 2)], dim=1), ids

    def velocity(self, denoiser, x, sigma, conditioning, size, guidance, dtype=None):
        # Only the first tokens are latents; the others are the image's.
        return super().velocity(denoiser, x, sigma, conditioning, size, guidance, dtype)[
            :, : x.shape[1]
        ]
