"""Qwen-Image: classifier-free guidance rescaled to the norm of the prediction with the prompt,
packed latents, and a video VAE.

Texts have no fixed length. Embeddings are padded to `max_sequence_length` with an attention mask,
so that prompts can be stacked and every forward has the same shape. Padding changes only the last
bits: masked tokens are never attended to, and a token's position does not depend on later tokens.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from diffusers.models.transformers import transformer_qwenimage

from tempflow.compat import unpack_latents
from tempflow.models.arguments import finite_number
from tempflow.models.base import Conditioning
from tempflow.models.guidance import GuidedPolicy
from tempflow.models.sizes import check_multiple, resolution_shift
from tempflow.models.vae import channel_statistics
from tempflow.types import Example, Size


def _text_length(
    embeddings: torch.Tensor, mask: torch.Tensor | None
) -> tuple[int, None, torch.Tensor | None]:
    """A replacement of diffusers' `compute_text_seq_len_from_mask`: the number of text tokens, None
    for the lengths of the samples, which the caller does not use, and the mask as bool."""
    # diffusers computes those lengths with a copy from the host in every forward. The host waits
    # for the copy, and a CUDA graph cannot capture it.
    return embeddings.shape[1], None, None if mask is None else mask.bool()


# For the whole process: diffusers' pipelines give the same images with it.
transformer_qwenimage.compute_text_seq_len_from_mask = _text_length


class QwenImagePolicy(GuidedPolicy):
    """Guided velocities of a QwenImageTransformer2DModel with the same inputs as in
    QwenImagePipeline, whose `true_cfg_scale` is the guidance scale here."""

    text_length, longest_text = 512, 1024
    masks_text = True
    default_negative_prompt = " "  # the model's authors use it instead of an empty text
    lora_targets: tuple[str, ...] = (
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
        # The VAE halves the size once for each entry; packing halves it once more.
        return 2 ** (len(vae_config["temperal_downsample"]) + 1)

    def sample(self, prompts, *, guidance_scale, negative_prompts=None, **call):
        """As `Policy.sample`, but without negative prompts there is no guidance, as in the
        pipeline. Training and evaluation use `default_negative_prompt` then."""
        if negative_prompts is None and finite_number("guidance_scale", guidance_scale) > 1:
            warnings.warn(
                "negative_prompts: none, so guidance_scale has no effect, as in"
                f" {type(self.pipe).__name__}",
                stacklevel=2,
            )
            guidance_scale = 1.0
        return super().sample(
            prompts, guidance_scale=guidance_scale, negative_prompts=negative_prompts, **call
        )

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        texts = [example.text for example in examples]
        embeds, mask = self.pipe.encode_prompt(
            texts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        if mask is None:  # the pipeline returns None if no text is padded
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        missing = self.max_sequence_length - embeds.shape[1]
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, missing))
        return {
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": torch.nn.functional.pad(mask.bool(), (0, missing)),
        }

    def empty_embeddings(self, count: int) -> Conditioning:
        shape = count, self.max_sequence_length
        embeds = torch.empty(
            *shape,
            self.pipe.transformer.config.joint_attention_dim,
            dtype=self.dtype,
            device=self.device,
        )
        return {
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": torch.empty(shape, dtype=torch.bool, device=self.device),
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
        given = np.linspace(1.0, 1 / num_steps, num_steps)
        # Without a number of steps, as the pipeline calls it; the scheduler counts the sigmas.
        scheduler.set_timesteps(sigmas=given, mu=resolution_shift(scheduler, length, 1.15))
        return scheduler.sigmas.float().cpu()

    def _forward(self, denoiser, x, sigma, conditioning, size):
        return denoiser(
            hidden_states=x,
            # The pipeline's own arithmetic: timesteps are 1000 sigma, rounded to the model's dtype.
            timestep=(sigma * 1000).to(x.dtype) / 1000,
            img_shapes=[[(1, *self._packed_size(size))]] * len(x),
            **conditioning,
            return_dict=False,
        )[0]

    def _combine(self, positive, negative, scale):
        guided = super()._combine(positive, negative, scale)
        # Per token, as in the pipeline: guidance changes the direction of a token's velocity only.
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _decode(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        vae = self.pipe.vae
        x = unpack_latents(self.pipe, latents, size.height, size.width)
        mean, std = channel_statistics(vae, x.device)
        # An image is a video of one frame to this VAE.
        return vae.decode((x * std + mean).to(vae.dtype), return_dict=False)[0][:, :, 0]
