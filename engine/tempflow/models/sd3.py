"""Stable Diffusion 3 and 3.5: classifier-free guidance, unpacked latents, two CLIP encoders and T5.

The pipeline's skip-layer guidance is not supported.
"""

from __future__ import annotations

from typing import Any

import torch

from tempflow.errors import UserError
from tempflow.models.base import Conditioning
from tempflow.models.guidance import GuidedPolicy
from tempflow.models.sizes import check_multiple, resolution_shift
from tempflow.types import Example, Size

PATCH = 2  # latent pixels on each side of a token, in every checkpoint of the family


def token_grid(size: Size, vae_config: dict, transformer_config: dict) -> tuple[int, int]:
    """Rows and columns of an image's tokens. UserError if they are more than the transformer has
    positions for."""
    multiple = SD3Policy.size_multiple(vae_config)
    check_multiple(size, multiple)
    most = transformer_config["pos_embed_max_size"] * multiple
    if max(size.height, size.width) > most:
        raise UserError(
            f"rollout.height, rollout.width: {size}; this model makes at most {most} pixels on each"
            " side"
        )
    return size.height // multiple, size.width // multiple


class SD3Policy(GuidedPolicy):
    """Guided velocities of an SD3Transformer2DModel with the same inputs as in
    StableDiffusion3Pipeline."""

    text_length, longest_text = 256, 512
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    @staticmethod
    def size_multiple(vae_config) -> int:
        return PATCH * 2 ** (len(vae_config["block_out_channels"]) - 1)

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        texts = [example.text for example in examples]
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=texts,
            # None: all three encoders read the same text.
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def empty_embeddings(self, count: int) -> Conditioning:
        config = self.pipe.transformer.config
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        # The tokens of CLIP come before those of T5.
        tokens = self.pipe.text_encoder.config.max_position_embeddings + self.max_sequence_length
        return {
            "encoder_hidden_states": torch.empty(count, tokens, config.joint_attention_dim, **like),
            "pooled_projections": torch.empty(count, config.pooled_projection_dim, **like),
        }

    def _tokens(self, size: Size) -> tuple[int, int]:
        return token_grid(size, self.pipe.vae.config, self.pipe.transformer.config)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        rows, columns = self._tokens(size)
        return self.pipe.transformer.config.in_channels, PATCH * rows, PATCH * columns

    def sigmas(self, num_steps: int, size: Size) -> torch.Tensor:
        scheduler, (rows, columns) = self.pipe.scheduler, self._tokens(size)
        # As in the pipeline: a mu only for dynamic shifting.
        dynamic = scheduler.config.get("use_dynamic_shifting")
        scheduler.set_timesteps(
            num_steps, mu=resolution_shift(scheduler, rows * columns, 1.16) if dynamic else None
        )
        return scheduler.sigmas.float().cpu()

    def _forward(self, denoiser, x, sigma, conditioning, size):
        # The pipeline leaves timesteps in fp32, 1000 sigma.
        return denoiser(hidden_states=x, timestep=sigma * 1000, **conditioning, return_dict=False)[
            0
        ]

    def _decode(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        vae = self.pipe.vae
        x = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(x.to(vae.dtype), return_dict=False)[0]
