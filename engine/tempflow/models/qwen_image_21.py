"""Qwen-Image 2.1, text to image: one stream of text and image tokens, causal in the text, and a VAE
whose latents are not packed in patches.

The pipeline does not truncate prompts. It pads the shorter prompts of a call, and the positions of
the image's tokens depend on the padding. Here a prompt is embedded alone, without padding, so
images equal those of the pipeline called with one prompt at a time. Without condition images the
order of the tokens is known, so the transformer's forward is replaced by one that does not read
their places from a mask, for which the host would wait (`_of_text`). The VAE decodes RGBA; the
alpha channel is dropped. Editing with condition images is not supported.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import QwenImage21Transformer2DModel

from tempflow.models.base import Conditioning
from tempflow.models.guidance import GuidedPolicy
from tempflow.models.qwen_image import QwenImagePolicy
from tempflow.models.sizes import check_multiple, resolution_shift
from tempflow.models.vae import channel_statistics
from tempflow.types import Example, Size

TOKEN = 16  # pixels on each side of an image token
with_condition_images = QwenImage21Transformer2DModel.forward


def _positions(text: int, rows: int, columns: int, device: torch.device) -> list[torch.Tensor]:
    """Frame, row and column of each token, [text + rows * columns] each. A text token has its
    number in all three; image tokens share the frame after the text, and their rows and columns are
    centered around 0."""
    # Computed on the device, because a copy from the host cannot be captured in a CUDA graph.
    words, flat = torch.arange(text, device=device), torch.arange(rows * columns, device=device)
    of_image = (
        torch.full_like(flat, text),
        flat // columns - (rows - rows // 2),
        flat % columns - (columns - columns // 2),
    )
    return [torch.cat([words, index]) for index in of_image]


def _rotary(pos_embed, text: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """The transformer's rotary embedding of these tokens, complex [tokens, half a head]."""
    parts = []
    for index, dim in zip(_positions(text, rows, columns, device), pos_embed.axes_dim, strict=True):
        powers = torch.arange(0, dim, 2, device=device).to(torch.float32).div(dim)
        angles = torch.outer(index, 1.0 / torch.pow(pos_embed.theta, powers))
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, dim=-1)


def _of_text(
    self, hidden_states, encoder_hidden_states, timestep, img_shapes, img_mask=None, **more
):
    """The transformer's forward for text to image: without an `img_mask`, which condition images
    need, the image's tokens follow the text."""
    if img_mask is not None:
        return with_condition_images(
            self, hidden_states, encoder_hidden_states, timestep, img_shapes, img_mask, **more
        )
    _, rows, columns = img_shapes[0][-1]
    tokens = torch.cat([self.txt_in(encoder_hidden_states), self.img_in(hidden_states)], dim=1)
    text, device = encoder_hidden_states.shape[1], hidden_states.device
    rotary, is_image = _rotary(self.pos_embed, text, rows, columns, device), None
    # A causal text is modulated as at time 0, whatever the image's: one more timestep at the end.
    if self.config.causal_condition:
        timestep, is_image = (
            torch.cat([timestep, timestep.new_zeros(1)]),
            torch.arange(tokens.shape[1], device=device) >= text,
        )
    time = self.time_text_embed(timestep, tokens)
    modulation, segments = self.modulation(time), [(0, text, True)]
    for block in self.transformer_blocks:
        # By position, because gradient checkpointing passes no names.
        inputs = tokens, modulation, rotary, None, is_image, None, None, None, segments, None
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        tokens = (
            self._gradient_checkpointing_func(block, *inputs) if checkpointed else block(*inputs)
        )
    return (self.proj_out(self.norm_out(tokens, time, is_image)[:, text:]),)


QwenImage21Transformer2DModel.forward = _of_text


class QwenImage21Policy(QwenImagePolicy):
    """Velocities of a QwenImage21Transformer2DModel with the same inputs as in its pipeline. Its
    authors sample without guidance."""

    ragged = True
    # The image's positions follow the length of the text, and one forward has one set of positions.
    joins_lengths = False
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    _combine = GuidedPolicy._combine  # not rescaled, unlike Qwen-Image's

    def _join(self, negative, positive):
        lengths = [half["encoder_hidden_states"].shape[1] for half in (negative, positive)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"texts of {lengths[0]} and {lengths[1]} tokens cannot share a forward"
            )
        return super()._join(negative, positive)

    @staticmethod
    def size_multiple(vae_config) -> int:
        # Condition images come in groups of 2 x 2 tokens, and the same is asked of every output.
        return 2 * TOKEN

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        (example,) = examples
        embeds, _, _ = self.pipe.encode_prompt([example.text], device=self.device)
        return {"encoder_hidden_states": embeds}

    def empty_embeddings(self, count: int) -> Conditioning:
        shape = count, self.max_sequence_length, self.pipe.transformer.config.context_in_dim
        return {"encoder_hidden_states": torch.empty(shape, dtype=self.dtype, device=self.device)}

    def _packed_size(self, size: Size) -> tuple[int, int]:
        check_multiple(size, 2 * TOKEN)
        return size.height // TOKEN, size.width // TOKEN

    def sigmas(self, num_steps: int, size: Size) -> torch.Tensor:
        """The checkpoint's own grid if it has one for this number of steps, as distilled
        checkpoints do; otherwise even steps before the shift."""
        scheduler, own = self.pipe.scheduler, self.pipe.config.get("sample_sigmas") or []
        given = own if len(own) == num_steps else np.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(
            sigmas=given, mu=resolution_shift(scheduler, self.latent_shape(size)[0], 1.15)
        )
        return scheduler.sigmas.float().cpu()

    def _decode(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        vae, (rows, columns) = self.pipe.vae, self._packed_size(size)
        x = latents.to(vae.dtype).transpose(1, 2).unflatten(2, (1, rows, columns))
        mean, std = (t.to(x.dtype) for t in channel_statistics(vae, x.device))
        # RGB of the only frame.
        return vae.decode(x * std + mean, return_dict=False)[0][:, :3, 0]
