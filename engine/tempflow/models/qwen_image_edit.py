"""Qwen-Image-Edit, and Qwen-Image-Edit-Plus (2509 and later): Qwen-Image whose transformer also
sees the tokens of the images to edit.

The text encoder reads the images together with the prompt or the negative prompt, so both
embeddings depend on them. Images are scaled to about a megapixel and encoded to the mode of the
VAE; the text encoder of Edit gets the same image, that of Plus one of about 384 x 384. Embeddings
are neither padded nor truncated, because their length depends on the images. The tokens of the
images follow those of the latents, in the order of the images; the transformer's predictions for
them are dropped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from tempflow.media import condition_image
from tempflow.models.base import Conditioning
from tempflow.models.qwen_image import QwenImagePolicy
from tempflow.models.vae import encoding_whole
from tempflow.types import Example

TEXT = "encoder_hidden_states"
# With a number: name of an image in the conditioning, [n, rows, columns, channels].
IMAGE = "image_tokens_"
AREA = 1024 * 1024  # pixels of an image for the VAE, about
PATCH = 28  # pixels on each side of an image token in the text encoder
TEMPLATE = 6  # tokens of the chat template after the prompt, and before each image


class QwenImageEditPolicy(QwenImagePolicy):
    """Guided velocities of a QwenImageTransformer2DModel that edits an image, with the same inputs
    as in QwenImageEditPipeline."""

    ragged = True
    masks_text = False  # no text is padded, except by `_join`
    images_taken = (1, 1)
    embeds_with = ("vae",)
    encoder_area = AREA
    """About how many pixels an image has for the text encoder."""

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        (example,) = examples
        seen, pixels = self._scaled([condition_image(image) for image in example.images])
        embeds, _ = self.pipe.encode_prompt([example.text], image=seen, device=self.device)
        tokens = [self._image_tokens(image) for image in pixels]
        return {"encoder_hidden_states": embeds} | {
            f"{IMAGE}{n}": one for n, one in enumerate(tokens)
        }

    def _scaled(
        self, images: list[Image.Image]
    ) -> tuple[Image.Image | list[Image.Image], list[torch.Tensor]]:
        """Scale an example's images: PIL images for the text encoder, and for the VAE tensors
        [1, 3, 1, H, W] in [-1, 1]."""
        (image,) = images
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(
            AREA, image.width / image.height
        )
        seen = self.pipe.image_processor.resize(image, height, width)
        return seen, [self.pipe.image_processor.preprocess(seen, height, width).unsqueeze(2)]

    def _image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """The tokens [1, rows, columns, channels] of an image [1, 3, 1, H, W]."""
        pipe, (height, width) = self.pipe, pixels.shape[-2:]
        with encoding_whole(pipe.vae):
            _, tokens = pipe.prepare_latents(
                pixels,
                batch_size=1,
                num_channels_latents=pipe.latent_channels,
                height=height,
                width=width,
                dtype=pipe.vae.dtype,
                device=self.device,
                generator=None,
                latents=torch.empty(0),  # else the pipeline would draw noise for them
            )
        multiple = self.size_multiple(pipe.vae.config)
        return tokens.unflatten(1, (height // multiple, width // multiple))

    def empty_embeddings(self, count: int) -> Conditioning:
        config = self.pipe.transformer.config
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        pixels, seen_pixels = (
            pipeline_qwenimage_edit.calculate_dimensions(area, 1.0)[0]
            for area in (AREA, self.encoder_area)
        )
        # For square images: other ratios of the same area have about as many tokens.
        images, side = self.images_taken[1], pixels // self.size_multiple(self.pipe.vae.config)
        seen = math.ceil(seen_pixels / PATCH) ** 2
        length = self.max_sequence_length + TEMPLATE + images * (seen + TEMPLATE)
        embeds = {
            "encoder_hidden_states": torch.empty(count, length, config.joint_attention_dim, **like)
        }
        return embeds | {
            f"{IMAGE}{n}": torch.empty(count, side, side, config.in_channels, **like)
            for n in range(images)
        }

    def _join(self, negative, positive):
        """Pad and mask the shorter texts, which changes only the last bits."""
        texts = [half[TEXT] for half in (negative, positive)]
        if texts[0].shape == texts[1].shape:
            return super()._join(negative, positive)
        longest = max(text.shape[1] for text in texts)
        padded = [
            torch.nn.functional.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts
        ]
        known = [
            torch.arange(longest, device=text.device).expand(len(text), -1) < text.shape[1]
            for text in texts
        ]
        images = super()._join(
            negative, {name: tensor for name, tensor in positive.items() if name != TEXT}
        )
        return {TEXT: torch.cat(padded), f"{TEXT}_mask": torch.cat(known), **images}

    def _forward(self, denoiser, x, sigma, conditioning, size):
        # Sorted: the images' order is that of their numbers, and names may come in any order. With
        # at most three images one digit is enough.
        images = [tensor for name, tensor in sorted(conditioning.items()) if name.startswith(IMAGE)]
        grids = [(1, *self._packed_size(size)), *((1, *image.shape[1:3]) for image in images)]
        return denoiser(
            hidden_states=torch.cat([x, *(image.flatten(1, 2) for image in images)], dim=1),
            # The pipeline's own arithmetic: timesteps are 1000 sigma, rounded to the model's dtype.
            timestep=(sigma * 1000).to(x.dtype) / 1000,
            img_shapes=[grids] * len(x),
            encoder_hidden_states=conditioning[TEXT],
            encoder_hidden_states_mask=conditioning.get(f"{TEXT}_mask"),
            return_dict=False,
        )[0][:, : x.shape[1]]


class QwenImageEditPlusPolicy(QwenImageEditPolicy):
    """Guided velocities of a QwenImageTransformer2DModel that edits one to three images, with the
    same inputs as in QwenImageEditPlusPipeline."""

    images_taken = (1, 3)  # the numbers that its authors trained it with
    encoder_area = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE

    def _scaled(self, images):
        ratios, processor = (
            [image.width / image.height for image in images],
            self.pipe.image_processor,
        )
        small = [
            pipeline_qwenimage_edit_plus.calculate_dimensions(self.encoder_area, ratio)
            for ratio in ratios
        ]
        large = [pipeline_qwenimage_edit_plus.calculate_dimensions(AREA, ratio) for ratio in ratios]
        seen = [
            processor.resize(image, height, width)
            for image, (width, height) in zip(images, small, strict=True)
        ]
        pixels = [
            processor.preprocess(image, height, width)
            for image, (width, height) in zip(images, large, strict=True)
        ]
        return seen, [one.unsqueeze(2) for one in pixels]
