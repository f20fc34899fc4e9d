"""FLUX.1 (dev, schnell and finetunes): latents packed in patches of 2 x 2, the guidance scale as an
input of the transformer, and a sampling grid shifted by the resolution.

There is no classifier-free guidance and so no negative prompt.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tempflow.compat import flux_image_ids, unpack_latents
from tempflow.models.base import Conditioning, Policy
from tempflow.models.sizes import check_multiple, resolution_shift
from tempflow.types import Example, Size


@lru_cache(maxsize=16)
def image_ids(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Position ids of an image's tokens, [rows * columns, 3]."""
    # Cached, because a copy from the host to the GPU cannot be captured in a CUDA graph.
    return flux_image_ids(rows, columns, device, dtype)


@lru_cache(maxsize=16)
def text_ids(length: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Position ids of the text's tokens, [length, 3]; cached for the same reason."""
    return torch.zeros(length, 3, device=device, dtype=dtype)


class FluxPolicy(Policy):
    """Velocities of a FluxTransformer2DModel with the same inputs as in FluxPipeline."""

    text_length, longest_text = 512, 512
    lora_targets: tuple[str, ...] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    @classmethod
    def takes_guidance_with(cls, transformer):
        # Of [dev] and [schnell], which have the same pipeline, only [dev] has an input for it.
        return bool(transformer.get("guidance_embeds"))

    @staticmethod
    def size_multiple(vae_config) -> int:
        # The VAE halves the size between its blocks, one time less than it has blocks; packing
        # halves it once more.
        return 2 ** len(vae_config["block_out_channels"])

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        texts = [example.text for example in examples]
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=None,  # T5 reads the same text as CLIP
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def empty_embeddings(self, count: int) -> Conditioning:
        config = self.pipe.transformer.config
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        return {
            "encoder_hidden_states": torch.empty(
                count, self.max_sequence_length, config.joint_attention_dim, **like
            ),
            "pooled_projections": torch.empty(count, config.pooled_projection_dim, **like),
        }

    def _packed_size(self, size: Size) -> tuple[int, int]:
        multiple = self.size_multiple(self.pipe.vae.config)
        check_multiple(size, multiple)
        return size.height // multiple, size.width // multiple

    def latent_shape(self, size: Size) -> tuple[int, int]:
        rows, columns = self._packed_size(size)
        return rows * columns, self.pipe.transformer.config.in_channels

    def sigmas(self, num_steps: int, size: Size) -> torch.Tensor:
        scheduler, length = self.pipe.scheduler, self.latent_shape(size)[0]
        # As in the pipeline, the scheduler makes the grid itself only if it is set to flow sigmas.
        given = (
            None
            if scheduler.config.get("use_flow_sigmas")
            else np.linspace(1.0, 1 / num_steps, num_steps)
        )
        scheduler.set_timesteps(
            num_steps, sigmas=given, mu=resolution_shift(scheduler, length, 1.15)
        )
        return scheduler.sigmas.float().cpu()

    def _image_inputs(
        self, x: torch.Tensor, conditioning: Conditioning, size: Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The transformer's image tokens [n, tokens, channels], those of the latents first, and
        their position ids [tokens, 3]."""
        return x, image_ids(*self._packed_size(size), x.device, x.dtype)

    def velocity(self, denoiser, x, sigma, conditioning, size, guidance, dtype=None):
        dtype = dtype or self.dtype
        text = conditioning["encoder_hidden_states"]
        hidden_states, img_ids = self._image_inputs(x.to(dtype), conditioning, size)
        scale = None
        if self.pipe.transformer.config.guidance_embeds:
            scale = torch.full((len(x),), guidance, device=x.device, dtype=torch.float32)
        return denoiser(
            hidden_states=hidden_states,
            # The pipeline's own arithmetic: timesteps are 1000 sigma, rounded to the model's dtype.
            timestep=(sigma * 1000).to(dtype) / 1000,
            guidance=scale,
            encoder_hidden_states=text.to(dtype),
            pooled_projections=conditioning["pooled_projections"].to(dtype),
            img_ids=img_ids,
            txt_ids=text_ids(text.shape[1], x.device, dtype),
            return_dict=False,
        )[0]

    def _decode(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        vae = self.pipe.vae
        x = unpack_latents(self.pipe, latents, size.height, size.width)
        x = x / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(x.to(vae.dtype), return_dict=False)[0]
