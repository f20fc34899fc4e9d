"""FLUX.2 [dev] and [klein]: 2 x 2 patches of a batch-normalized VAE, language models as text
encoders, a shift by size and steps.

Three classes of one architecture. [dev] is given its guidance scale as a number. [klein] base
models are guided by a second forward with an empty prompt. [klein] models that are distilled to a
few steps are not guided at all. Text is padded to `max_sequence_length` tokens that are all
attended to, as the pipelines do it, so a shorter length is another conditioning.

A prompt may bring reference images. Each is scaled down to a megapixel where it is larger, and
cropped about its center to whole tokens; the tokens of the VAE's mode follow those of the latents,
told apart by the first of their position ids, and what the transformer predicts for them is cut
off.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image

from tempflow.errors import UserError
from tempflow.media import condition_image
from tempflow.models.base import Conditioning, Policy
from tempflow.models.guidance import GuidedPolicy
from tempflow.models.sizes import check_multiple
from tempflow.models.vae import encoding_whole
from tempflow.types import Example, Size

MOST_SINGLE_BLOCKS = 48  # of the published models: [dev]'s
IMAGE = "image_"  # with a number: of the conditioning, [n, rows, columns, channels]
AREA = 1024 * 1024  # pixels of a reference image, at most
APART = 10  # between the first position ids of latents and reference images


@lru_cache(maxsize=64)
def position_ids(
    grids: tuple[tuple[int, int], ...], text: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates (image, row, column, place in the text) of the tokens of latents and reference
    images of so many rows and columns, and of the text's tokens, int64 [tokens, 4] each.

    Kept, because copying them to a GPU anew cannot be captured in a graph.
    """
    zero = torch.zeros(1, dtype=torch.int64)
    images = [
        torch.cartesian_prod(zero + APART * n, torch.arange(rows), torch.arange(columns), zero)
        for n, (rows, columns) in enumerate(grids)
    ]
    return torch.cat(images).to(device), torch.cartesian_prod(
        zero, zero, zero, torch.arange(text)
    ).to(device)


def to_tokens(latents: torch.Tensor) -> torch.Tensor:
    """[n, channels, rows, columns] -> [n, rows * columns, channels]."""
    return latents.flatten(2).transpose(1, 2)


class _Flux2(Policy):
    """What the three have in common."""

    text_length, longest_text = 512, 512
    ragged = True  # with reference images
    images_taken = (0, 10)
    embeds_with = ("vae",)
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",
        # By number: in the double blocks "attn.to_out" is the list that holds to_out.0, which
        # cannot be adapted itself.
        *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(MOST_SINGLE_BLOCKS)),
    )

    @staticmethod
    def size_multiple(vae_config) -> int:
        # The VAE halves the size between its blocks, patching once more.
        return 2 ** len(vae_config["block_out_channels"])

    @classmethod
    def ragged_with(cls, images: int) -> bool:
        return images > 0

    @classmethod
    def check_images(cls, example: Example, where: str) -> None:
        super().check_images(example, where)
        for image in example.images:
            try:
                with (
                    Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image)
                ) as opened:  # its header alone
                    Flux2ImageProcessor.check_image_input(opened)
            except (
                OSError,
                ValueError,
            ) as error:  # no image, or one of a size that the pipeline refuses
                raise UserError(f"{where}: {error}") from None

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        texts = [example.text for example in examples]
        embeds, _ = self.pipe.encode_prompt(
            prompt=texts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        if not any(example.images for example in examples):
            return {"encoder_hidden_states": embeds}
        (example,) = examples
        return {"encoder_hidden_states": embeds} | {
            f"{IMAGE}{n}": self._image_tokens(image) for n, image in enumerate(example.images)
        }

    def _image_tokens(self, image) -> torch.Tensor:
        """Of one of `Example.images`, [1, rows, columns, channels]."""
        pipe, multiple, image = (
            self.pipe,
            self.size_multiple(self.pipe.vae.config),
            condition_image(image),
        )
        if image.width * image.height > AREA:
            scale = math.sqrt(AREA / (image.width * image.height))
            image = image.resize(
                (int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS
            )
        rows, columns = image.height // multiple, image.width // multiple
        pixels = pipe.image_processor.preprocess(
            image, height=rows * multiple, width=columns * multiple, resize_mode="crop"
        )
        with encoding_whole(pipe.vae):
            tokens, _ = pipe.prepare_image_latents(
                [pixels], 1, generator=None, device=self.device, dtype=pipe.vae.dtype
            )
        return tokens.unflatten(1, (rows, columns))

    def empty_embeddings(self, count: int) -> Conditioning:
        config = self.pipe.transformer.config
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        side = math.isqrt(AREA) // self.size_multiple(self.pipe.vae.config)
        images = {
            f"{IMAGE}{n}": torch.empty(count, side, side, config.in_channels, **like)
            for n in range(self.images_taken[1])
        }
        return {
            "encoder_hidden_states": torch.empty(
                count, self.max_sequence_length, config.joint_attention_dim, **like
            )
        } | images

    def _grid(self, size: Size) -> tuple[int, int]:
        multiple = self.size_multiple(self.pipe.vae.config)
        check_multiple(size, multiple)
        return size.height // multiple, size.width // multiple

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        return self.pipe.transformer.config.in_channels, *self._grid(size)

    def sigmas(self, num_steps: int, size: Size) -> torch.Tensor:
        scheduler, (rows, columns) = self.pipe.scheduler, self._grid(size)
        given = (
            None
            if scheduler.config.get("use_flow_sigmas")
            else np.linspace(1.0, 1 / num_steps, num_steps)
        )
        scheduler.set_timesteps(
            num_steps, sigmas=given, mu=compute_empirical_mu(rows * columns, num_steps)
        )
        return scheduler.sigmas.float().cpu()

    def velocity(self, denoiser, x, sigma, conditioning, size, guidance, dtype=None):
        dtype = dtype or self.dtype
        return self._forward(
            denoiser,
            x.to(dtype),
            sigma,
            {name: tensor.to(dtype) for name, tensor in conditioning.items()},
            size,
        )

    def _forward(
        self, denoiser, x, sigma, conditioning, size, guidance: torch.Tensor | None = None
    ):
        text, latents = conditioning["encoder_hidden_states"], to_tokens(x)
        images = [conditioning[f"{IMAGE}{n}"] for n in range(len(conditioning) - 1)]
        grids = self._grid(size), *(tuple(image.shape[1:3]) for image in images)
        image_ids, text_ids = position_ids(grids, text.shape[1], x.device)
        predicted = denoiser(
            hidden_states=torch.cat([latents, *(image.flatten(1, 2) for image in images)], dim=1),
            # The pipelines' own arithmetic: timesteps are 1000 sigma, rounded to the model's dtype.
            timestep=(sigma * 1000).to(x.dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0][:, : latents.shape[1]]
        return predicted.transpose(1, 2).reshape(x.shape).contiguous()

    def _for_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """Final latents [n, 4 C, rows, columns] as the VAE decodes them: the batch norm undone,
        patches of 2 x 2 taken apart."""
        vae, (count, channels, rows, columns) = self.pipe.vae, latents.shape
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        mean, std = (values.view(1, -1, 1, 1).to(latents) for values in (vae.bn.running_mean, std))
        patches = (latents * std + mean).reshape(count, channels // 4, 2, 2, rows, columns)
        return patches.permute(0, 1, 4, 2, 5, 3).reshape(
            count, channels // 4, 2 * rows, 2 * columns
        )

    def _decode(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        vae = self.pipe.vae
        return vae.decode(self._for_vae(latents).to(vae.dtype), return_dict=False)[0]


class Flux2Policy(_Flux2):
    """Velocities of a Flux2Transformer2DModel as FLUX.2 [dev]'s pipeline asks for them, guidance
    embedded."""

    def velocity(self, denoiser, x, sigma, conditioning, size, guidance, dtype=None):
        dtype = dtype or self.dtype
        scale = torch.full((len(x),), guidance, device=x.device, dtype=torch.float32)
        return self._forward(
            denoiser,
            x.to(dtype),
            sigma,
            {name: tensor.to(dtype) for name, tensor in conditioning.items()},
            size,
            scale,
        )

    def finished(self, latents: torch.Tensor) -> torch.Tensor:
        return to_tokens(latents)


class Flux2KleinPolicy(_Flux2):
    """Velocities of FLUX.2 [klein]: guided by an empty prompt in base models, without guidance in
    distilled ones."""

    takes_guidance = False

    @classmethod
    def variant(cls, index):
        return cls if index.get("is_distilled") else Flux2KleinBasePolicy

    def finished(self, latents: torch.Tensor) -> torch.Tensor:
        return self._for_vae(latents)


class Flux2KleinBasePolicy(Flux2KleinPolicy, GuidedPolicy):
    """Guided velocities of FLUX.2 [klein] base; another negative prompt than "" is what the
    pipeline takes as negative_prompt_embeds."""

    takes_guidance = True
    halves_alike = True
    velocity = GuidedPolicy.velocity
