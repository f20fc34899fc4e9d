"""What the engine needs to know of a model family: the `Policy` protocol, and sampling written once on top of it.

A policy owns the frozen parts (text encoders, VAE, scheduler) and one copy of the transformer. `velocity` takes the
transformer to evaluate as an argument, because training, rollout and reference run different copies of it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from tempflow.errors import UserError
from tempflow.models.arguments import as_negative_prompts, as_prompts, check_latents, finite_number, positive_int
from tempflow.sampling.steps import ode_coefficients
from tempflow.types import Size
from tempflow_kernels import sde_step

TILE, NO_IMAGE = 8, (255, 0, 255)  # pixels a side and color of the tiles that stand for a missing image
Conditioning = dict[str, torch.Tensor]  # prompt embeddings by name, leading dimension = prompts


def take(conditioning: Conditioning, indices: list[int]) -> Conditioning:
    """The conditioning of a batch of rows, by prompt index."""
    return {name: tensor[indices] for name, tensor in conditioning.items()}


def check_multiple(height: int, width: int, multiple: int) -> None:
    """UserError for a picture size that the model cannot make."""
    if height % multiple or width % multiple:
        raise UserError(f"rollout.height, rollout.width: {height} x {width}; both must be multiples of {multiple}")


def resolution_shift(scheduler, length: int, max_shift: float) -> float:
    """mu of a scheduler's dynamic shifting for pictures of `length` tokens; max_shift: where its config does not say."""
    config = scheduler.config
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (long - short)
    return length * slope + (low - slope * short)


def no_image(height: int, width: int) -> np.ndarray:
    """What stands for an image that could not be made, uint8 [height, width, 3]: a magenta and black checkerboard."""
    rows, columns = np.ogrid[:height, :width]
    return np.where(((rows // TILE + columns // TILE) % 2 == 0)[..., None], NO_IMAGE, 0).astype(np.uint8)


class Policy(ABC):
    """A flow-matching text-to-image model of one family, loaded from a diffusers folder.

    transformer: the module that predicts velocities; pipe: the diffusers pipeline it came from. text_length,
    longest_text: its pipeline's default and limit of max_sequence_length. default_negative_prompt: of training and evaluation
    where a prompt brings none; None where the family takes none at all. masks_text: whether its attention is given a mask.
    """

    lora_targets: tuple[str, ...]
    text_length: int
    longest_text: int
    default_negative_prompt: str | None = None
    masks_text = False

    def __init__(self, pipe: Any, *, device: str | torch.device, max_sequence_length: int):
        self.pipe = pipe
        self.device = torch.device(device)
        self.max_sequence_length = max_sequence_length
        for module in self._modules():
            module.to(self.device).eval().requires_grad_(False)

    def _modules(self) -> list[torch.nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]

    @property
    def transformer(self) -> torch.nn.Module:
        return self.pipe.transformer

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.transformer.dtype

    @staticmethod
    @abstractmethod
    def size_multiple(vae_config: dict) -> int:
        """What height and width must be multiples of, in pixels."""

    @abstractmethod
    def embed(self, texts: list[str]) -> Conditioning:
        """Embeddings of texts, [n, ...] each, in the policy's dtype on its device. They depend on nothing but the text."""

    def encode(self, prompts: list[str], negative_prompts: list[str] | None = None) -> Conditioning:
        """Prompt embeddings, [n, ...] each, in the policy's dtype on its device; with those of n negative prompts, or of the
        family's default one. UserError for negative prompts where the family takes none."""
        if negative_prompts is not None:
            raise UserError(f"negative_prompts: {type(self).__name__} has its guidance built in and takes none")
        return self.embed(prompts)

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one latent in the layout that the pipeline accepts as `latents=`; UserError for impossible sizes."""

    @abstractmethod
    def sigmas(self, num_steps: int, height: int, width: int) -> torch.Tensor:
        """The sampling grid of the checkpoint's scheduler, fp32 [num_steps + 1] on the CPU, from 1 to 0."""

    @abstractmethod
    def velocity(
        self, transformer, x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, *,
        height: int, width: int, guidance_scale: float, dtype: torch.dtype | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """v = transformer(x, sigma) for a batch of rows, each at its own sigma; guided, where the family has guidance.

        x: [n, ...] of any float dtype, cast to `dtype` (default: the policy's); sigma: fp32 [n]. Returns `dtype`.
        """

    @abstractmethod
    def _decode(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the VAE makes of final latents, in its own range, [n, 3, height, width]."""

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Images of final latents, uint8 [n, height, width, 3], and which of them are finite, bool [n].

        NaN or infinity in a latent, or in what the VAE makes of it, is no image: a cast to uint8 would make it a black one, which
        rewards score like any other. Its place is taken by `no_image`.
        """
        decoded = self._decode(latents, height, width).float()
        finite = (latents.isfinite().flatten(1).all(1) & decoded.isfinite().flatten(1).all(1)).cpu().numpy()
        torch.nan_to_num_(decoded)  # the other images stay as they are
        images = (self.pipe.image_processor.postprocess(decoded, output_type="np") * 255).round().astype(np.uint8)
        images[~finite] = no_image(height, width)
        return images, finite

    def at(self, size: Size, guidance_scale: float) -> Sampler:
        """The policy at one image size and guidance scale."""
        return Sampler(self, size, guidance_scale)

    @torch.no_grad()
    def integrate(
        self, x: torch.Tensor, conditioning: Conditioning, *, height: int, width: int, num_steps: int,
        guidance_scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """The ODE from sigma = 1 to 0 on the policy's own transformer. x: fp32 [n, ...]; returns fp32 [n, ...]."""
        sigmas = self.sigmas(num_steps, height, width)
        grid = ode_coefficients(sigmas)
        no_key = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        for k in range(num_steps):
            sigma, a, b, tau = (s[k].expand(len(x)).to(x.device) for s in (sigmas, grid.a, grid.b, grid.tau))
            v = self.velocity(self.transformer, x, sigma, conditioning, height=height, width=width,
                              guidance_scale=guidance_scale)  # fmt: skip
            x = sde_step(x, v, a, b, tau, key=no_key)[0][:, 0]
        return x

    def sample(
        self, prompts: str | list[str], *, latents: torch.Tensor, height: int, width: int, num_steps: int,
        guidance_scale: float, negative_prompts: str | list[str] | None = None, decode: bool = True,
    ) -> list[Image.Image] | torch.Tensor:  # fmt: skip
        """ODE sampling from given initial latents; equals the family's diffusers pipeline to 1e-5 in fp32.

        prompts: n texts, or one. latents: [n, ...] in the layout that the pipeline accepts as `latents=`. negative_prompts: n, or
        one for all, as the pipeline takes them; unused without guidance. Returns PIL pictures, or with decode=False the final
        fp32 latents as the pipeline does with output_type="latent".
        Raises UserError for sizes or negative prompts that the family does not take, ValueError for any other argument that is not
        as described, naming it.
        """
        prompts = as_prompts(prompts)
        negative_prompts = as_negative_prompts(negative_prompts, len(prompts))
        height, width = positive_int("height", height), positive_int("width", width)
        num_steps = positive_int("num_steps", num_steps, most=1000)
        guidance_scale = finite_number("guidance_scale", guidance_scale)
        check_latents(latents, (len(prompts), *self.latent_shape(height, width)), f"{height} x {width}")
        conditioning = self.encode(prompts, negative_prompts)
        final = self.integrate(latents.to(self.device, torch.float32), conditioning, height=height, width=width,
                               num_steps=num_steps, guidance_scale=guidance_scale)  # fmt: skip
        if not decode:
            return final
        images, finite = self.decode(final, height, width)
        if not finite.all():
            warnings.warn(f"{(~finite).sum()} of {len(finite)} images hold NaN or infinity; a checkerboard stands for each", stacklevel=2)
        return [Image.fromarray(image) for image in images]


@dataclass(frozen=True)
class Sampler:
    """A policy at one image size and guidance scale: all that the scheduler, the updater and evaluations see of it."""

    policy: Policy
    size: Size
    guidance_scale: float

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return self.policy.latent_shape(self.size.height, self.size.width)

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The sampling grid, fp32 [num_steps + 1] on the CPU, from 1 to 0."""
        return self.policy.sigmas(num_steps, self.size.height, self.size.width)

    def velocity(self, transformer, x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, dtype=None) -> torch.Tensor:
        """v of a batch of rows, as `Policy.velocity`."""
        return self.policy.velocity(
            transformer, x, sigma, conditioning, height=self.size.height, width=self.size.width,
            guidance_scale=self.guidance_scale, dtype=dtype,
        )  # fmt: skip

    def decode(self, latents: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Images of final latents and which of them are finite, as `Policy.decode`."""
        return self.policy.decode(latents, self.size.height, self.size.width)
