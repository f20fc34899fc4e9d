"""Wan 2.1 and 2.2, text to video: classifier-free guidance, latents [C, F, H, W], and in Wan 2.2
A14B two experts for high and low noise levels.

The grid is that of the checkpoint's scheduler; the pipeline passes no sigmas to it. Published
folders have UniPC of order 2. Here its grid is integrated by Euler steps, which are UniPC of order
1 without the corrector, so samples differ from the pipeline's. For Wan 2.2 5B only text to video is
supported. Its pipeline then gives every token the same timestep, and one timestep per row gives the
same velocity.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from tempflow.errors import UserError
from tempflow.models.base import Conditioning
from tempflow.models.checking import TIMESTEPS, UNIPC
from tempflow.models.guidance import GuidedPolicy
from tempflow.models.sizes import check_multiple
from tempflow.models.vae import channel_statistics
from tempflow.models.wan_experts import Experts
from tempflow.types import Example, Scales, Size

PATCH = 2  # latent pixels on each side of a token, in every checkpoint of the family


def unipc_timesteps(sigmas: torch.Tensor) -> torch.Tensor:
    """The timesteps that UniPC gives the transformer: whole numbers, at most 999 because its grid
    begins 1e-6 below 1."""
    return (sigmas * TIMESTEPS).floor().clamp(max=TIMESTEPS - 1)


def unipc_grid(scheduler, num_steps: int) -> torch.Tensor:
    """UniPC's sigmas, fp32 [num_steps + 1], with 1 as the first one and with inner sigmas whose
    `unipc_timesteps` are UniPC's own."""
    scheduler.set_timesteps(num_steps)
    sigmas, timesteps = scheduler.sigmas.float().cpu(), scheduler.timesteps.cpu()
    # UniPC's own first sigma is 1 - 1e-6, where the noise of an SDE with 1 - sigma in its
    # denominator would be immense.
    sigmas[0] = 1
    inner = sigmas[:-1]
    # UniPC truncates timesteps in float64. Where rounding to fp32 has put a sigma on the other side
    # of a whole number, it is moved back by its last bits.
    while (off := timesteps - unipc_timesteps(inner)).any():
        inner.copy_(torch.nextafter(inner, inner + off))
    return sigmas


class WanPolicy(GuidedPolicy):
    """Guided velocities of one or two WanTransformer3DModel with the same inputs as in WanPipeline,
    for videos of 4 k + 1 frames."""

    text_length, longest_text = 512, 512  # texts are padded, and the padding is attended to
    schedulers = (*GuidedPolicy.schedulers, UNIPC)
    lora_targets = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
    )

    def __init__(self, pipe, **more):
        super().__init__(pipe, **more)
        parts = [getattr(pipe, name) for name in self.denoiser_parts(pipe.config)]
        # None until `set_denoiser` where the pipeline was loaded without its denoiser.
        self._denoiser = None if None in parts else self.join_denoiser(*parts)

    # ------------------------------------------------------------------------------------- denoiser
    @classmethod
    def denoiser_parts(cls, index) -> tuple[str, ...]:
        return (
            ("transformer",)
            if index.get("boundary_ratio") is None
            else ("transformer", "transformer_2")
        )

    @staticmethod
    def join_denoiser(part, second=None):
        return part if second is None else Experts(part, second)

    def denoiser(self) -> torch.nn.Module:
        return self._denoiser  # type: ignore[return-value]  # set when the policy is made

    def set_denoiser(self, module: torch.nn.Module) -> None:
        self._denoiser = module
        parts = (
            dict(module.named_children())
            if isinstance(module, Experts)
            else {"transformer": module}
        )
        self.pipe.register_modules(**parts)

    def expert(self, sigma: float) -> int:
        # By the timestep and not by sigma, as in the pipeline: UniPC truncates timesteps.
        return (
            0
            if self._boundary is None
            else int(self._timesteps(torch.tensor(sigma)) < self._boundary)
        )

    def only(self, denoiser, expert):
        if self._boundary is None:
            return denoiser
        one = isinstance(expert, int)
        return partial(denoiser, low=expert == 1 if one else [row == 1 for row in expert])

    @property
    def _boundary(self) -> float | None:
        """The timestep below which the second expert predicts; None for a single expert."""
        ratio = self.pipe.config.boundary_ratio
        return None if ratio is None else ratio * TIMESTEPS

    # --------------------------------------------------------------------------------- conditioning
    @classmethod
    def identity(cls, example: Example) -> tuple[str, ...]:
        """The text as the pipeline cleans it, which depends on whether ftfy is installed."""
        return (prompt_clean(example.text),)

    @torch.no_grad()
    def embed(self, examples: list[Example]) -> Conditioning:
        embeds, _ = self.pipe.encode_prompt(
            [example.text for example in examples],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds}

    def empty_embeddings(self, count: int) -> Conditioning:
        shape = count, self.max_sequence_length, self.pipe.transformer.config.text_dim
        return {"encoder_hidden_states": torch.empty(shape, dtype=self.dtype, device=self.device)}

    # ------------------------------------------------------------------------------------- sampling
    @staticmethod
    def size_multiple(vae_config) -> int:
        # Configs of Wan 2.1 may lack this factor, and that of time; the defaults are theirs.
        return PATCH * vae_config.get("scale_factor_spatial", 8)

    @staticmethod
    def frame_step(vae_config) -> int:
        return vae_config.get("scale_factor_temporal", 4)

    def latent_shape(self, size: Size) -> tuple[int, int, int, int]:
        vae = self.pipe.vae.config
        multiple, step = self.size_multiple(vae), self.frame_step(vae)
        check_multiple(size, multiple, step)
        frames = (size.frames - 1) // step + 1
        return (
            self.pipe.transformer.config.in_channels,
            frames,
            PATCH * size.height // multiple,
            PATCH * size.width // multiple,
        )

    @property
    def _by_unipc(self) -> bool:
        return type(self.pipe.scheduler).__name__ == UNIPC

    def sigmas(self, num_steps: int, size: Size) -> torch.Tensor:
        self.latent_shape(size)  # raises for a size that the model cannot make
        scheduler = self.pipe.scheduler
        if scheduler.config.get("use_dynamic_shifting"):
            raise UserError(
                "model.path: scheduler: sets use_dynamic_shifting, but WanPipeline passes no mu;"
                " set it to false"
            )
        if self._by_unipc:
            return unipc_grid(scheduler, num_steps)
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.float().cpu()

    def _timesteps(self, sigma: torch.Tensor) -> torch.Tensor:
        """The timesteps of sigmas [n] as the scheduler makes them, in fp32."""
        # Not rounded to the transformer's dtype; the pipeline does not, either.
        return unipc_timesteps(sigma) if self._by_unipc else sigma * TIMESTEPS

    def _forward(self, denoiser, x, sigma, conditioning, size):
        timestep, boundary = self._timesteps(sigma), self._boundary
        # A denoiser from `only` is a partial with `low` set; reading it from the timesteps, as
        # training does, is a wait that a CUDA graph cannot capture.
        known = boundary is None or isinstance(denoiser, partial)
        more = {} if known else {"low": timestep < cast(float, boundary)}
        return denoiser(
            hidden_states=x, timestep=timestep, **conditioning, **more, return_dict=False
        )[0]

    def _scale(self, guidance, sigma, dtype):
        if self._boundary is None or not isinstance(guidance, Scales):
            return guidance
        # A scale per row, chosen on the device: rows of both experts share forwards in training.
        low = self._timesteps(sigma) < self._boundary
        return torch.where(low, guidance.second, float(guidance)).to(dtype).reshape(-1, 1, 1, 1, 1)

    def _decode(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        vae = self.pipe.vae
        mean, std = channel_statistics(vae, latents.device)
        return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
