"""FLUX.2 [dev] and [klein]: 2 x 2 patches of a batch-normalized VAE, language models as text
encoders, and a sampling grid shifted by size and number of steps.

Three classes share one architecture. [dev] takes its guidance scale as an input. [klein] base
models are guided by a second prediction with an empty prompt. [klein] models that are distilled to
a few steps are not guided. As in the pipelines, text is padded to `max_sequence_length` tokens, all
of which are attended to, so another length gives other images.

A prompt may have reference images. Each one above a megapixel is scaled down to it, and is cropped
about its center to whole tokens. The mode of its VAE encoding gives tokens that follow those of the
latents; the first of their position ids numbers the images. The transformer's predictions for them
are dropped.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from PIL import Image

from tempflow.errors import UserError
from tempflow.media import condition_image
from tempflow.models.base import Conditioning, Policy
from tempflow.models.guidance import GuidedPolicy
from tempflow.models.sizes import check_multiple
from tempflow.models.vae import encoding_whole
from tempflow.types import Example, Size

MOST_SINGLE_BLOCKS = 48  # [dev] has the most of the published models
# With a number: name of a reference image in the conditioning, [n, rows, columns, channels].
IMAGE = "image_"
AREA = 1024 * 1024  # pixels of a reference image, at most
APART = 10  # distance between the first position ids of latents and reference images


@lru_cache(maxsize=64)
def position_ids(
    grids: tuple[tuple[int, int], ...], text: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids of all tokens: (image, row, column, place in the text).

    Args:
        grids: rows and columns of the latents' tokens, then of each reference image's.
        text: tokens of the text.
        device: where the ids are needed.

    Returns:
        Those of the latents and reference images, and those of the text, int64 [tokens, 4] each.
    """
    # Cached, because a copy from the host to the GPU cannot be captured in a CUDA graph.
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
    """What the three classes have in common."""

    text_length, longest_text = 512, 512
    ragged = True  # with reference images, see `ragged_with`
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
        # Named block by block: the ending "attn.to_out" alone would also match the double blocks,
        # where it is a list of modules, which peft cannot adapt.
        *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(MOST_SINGLE_BLOCKS)),
    )

    @staticmethod
    def size_multiple(vae_config) -> int:
        # The VAE halves the size between its blocks, one time less than it has blocks; patches
        # halve it once more.
        return 2 ** len(vae_config["block_out_channels"])

    @classmethod
    def ragged_with(cls, images: int) -> bool:
        return images > 0

    @classmethod
    def check_images(cls, example: Example, where: str) -> None:
        super().check_images(example, where)
        for image in example.images:
            try:
                # Opening a file reads only its header, so all images of a run are checked quickly.
                with (
                    Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image)
                ) as opened:
                    Flux2ImageProcessor.check_image_input(opened)
            # OSError: not an image. ValueError: a size that the pipeline refuses.
            except (OSError, ValueError) as error:
                raise UserError(f"{where}: {error}") from None

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        texts = [example.text for example in examples]
        embeds, _ = self.pipe.encode_prompt(
            prompt=texts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        if not any(example.images for example in examples):
            return {"encoder_hidden_states": embeds}
        (example,) = examples  # one at a time, since the family is ragged with images
        return {"encoder_hidden_states": embeds} | {
            f"{IMAGE}{n}": self._image_tokens(image) for n, image in enumerate(example.images)
        }

    def _image_tokens(self, image) -> torch.Tensor:
        """The tokens of one of `Example.images`, [1, rows, columns, channels]."""
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
        # Each image by itself: with all in one call the pipeline would join their tokens.
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
        # As in the pipelines, the scheduler makes the grid itself only if it is set to flow sigmas.
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
        """The denoiser's prediction of n rows [n, channels, rows, columns]; `guidance` [n] is the
        scale for a denoiser that takes it as an input."""
        text, latents = conditioning["encoder_hidden_states"], to_tokens(x)
        # Everything but the text is an image. By number, because the order of names may differ
        # between computed and stored embeddings.
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
        # Made contiguous once; the kernels would copy it at each use.
        return predicted.transpose(1, 2).reshape(x.shape).contiguous()

    def _for_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """Final latents [n, 4 C, rows, columns] as the VAE decodes them, [n, C, 2 rows, 2 columns]:
        the batch norm is undone and patches of 2 x 2 are taken apart."""
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
    """Velocities of FLUX.2 [dev] with the same inputs as in Flux2Pipeline; the guidance scale is an
    input of the transformer."""

    def embed(self, examples):
        self._check_text_length()
        return super().embed(examples)

    def _check_text_length(self) -> None:
        """UserError where the system message, which stands before every prompt, fills the text:
        then all prompts would be one."""
        (empty,) = self.pipe.tokenizer.apply_chat_template(
            format_input([""]), add_generation_prompt=False, tokenize=True, return_dict=True
        )["input_ids"]
        if self.max_sequence_length < len(empty):
            raise UserError(
                f"model.max_sequence_length: {self.max_sequence_length}; FLUX.2 [dev] needs"
                f" {len(empty)} at least, because its system message comes before the prompt"
            )

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
        # The two pipelines return latents at different points: this one before it unpacks tokens,
        # klein's after it has undone the batch norm and the patches.
        return to_tokens(latents)


class Flux2KleinPolicy(_Flux2):
    """Velocities of FLUX.2 [klein] as distilled, which take no guidance."""

    takes_guidance = False

    @classmethod
    def variant(cls, index):
        # Both kinds of checkpoints name the same pipeline class.
        return cls if index.get("is_distilled") else Flux2KleinBasePolicy

    def finished(self, latents: torch.Tensor) -> torch.Tensor:
        return self._for_vae(latents)


class Flux2KleinBasePolicy(Flux2KleinPolicy, GuidedPolicy):
    """Guided velocities of FLUX.2 [klein] base. The pipeline takes a negative prompt other than ""
    only as negative_prompt_embeds; here it is a text."""

    takes_guidance = True
    # Texts are padded to one length, and the negative prompt has the same reference images.
    halves_alike = True
    # Both base classes have a `velocity`, and that of `_Flux2` would come first.
    velocity = GuidedPolicy.velocity
