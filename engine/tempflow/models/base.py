"""What the engine needs to know of a model family: the `Policy` protocol, and sampling written once
on top of it.

A policy owns the frozen parts (text encoders, VAE, scheduler) and one copy of the denoiser.
`velocity` takes the denoiser to evaluate as an argument, because training, rollout and reference
run different copies of it. `Policy.at` gives a `Sampler`, which fixes the size and the guidance
scale of a run.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Iterator, cast

import numpy as np
import torch
from accelerate import cpu_offload
from PIL import Image

from tempflow.errors import UserError
from tempflow.media import frames_of, without_missing
from tempflow.models.arguments import (
    as_images,
    as_negative_prompts,
    as_prompts,
    check_latents,
    finite_number,
    positive_int,
)
from tempflow.models.conditions import Conditioning, Conditions
from tempflow.models.pixels import decoding, finite_pixels
from tempflow.models.sampler import Sampler
from tempflow.models.skeleton import skeleton_pipe
from tempflow.transfer import Fetched
from tempflow.types import Example, Scales, Size


def text_encoders(pipe: Any) -> dict[str, torch.nn.Module]:
    """By component name, those that are loaded."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, torch.nn.Module)
    }


def most_images(examples: list[Example]) -> int:
    """Condition images of the example that brings most."""
    return max((len(example.images) for example in examples), default=0)


def _images(count: int) -> str:
    return f"{count or 'no'} image{'s' * (count != 1)}"


class Policy(ABC):
    """A flow-matching model of images or videos of one family, loaded from a diffusers folder.

    pipe: the diffusers pipeline it came from.
    text_length, longest_text: its default and limit of max_sequence_length.
    default_negative_prompt: of training and evaluation where a prompt brings none; None where the
    family takes none at all.
    schedulers: classes whose grids its `sigmas` knows.
    masks_text: whether its attention is given a mask.
    embeds_with: components that `embed` needs beside text encoders, tokenizers and processors: the
    VAE, where it encodes images.
    takes_guidance: whether a guidance scale has an effect.
    images_taken: how many condition images an example brings, at least and at most.
    ragged: whether the embeddings of two examples may differ in shape. Then they are embedded one
        at a time, and rows share a forward only with rows of their shape.
    sized: whether embeddings depend on the size of the outputs, as those of images that are scaled
        to it do; then `embed` makes them for `self.size`.
    """

    lora_targets: tuple[str, ...]
    schedulers: tuple[str, ...] = ("FlowMatchEulerDiscreteScheduler",)
    text_length: int
    longest_text: int
    default_negative_prompt: str | None = None
    masks_text = False
    embeds_with: tuple[str, ...] = ()
    takes_guidance = True
    images_taken: tuple[int, int] = (0, 0)
    ragged = False
    sized = False
    size: Size | None = None

    def __init__(
        self,
        pipe: Any,
        *,
        device: str | torch.device,
        max_sequence_length: int,
        offload_text_encoders: bool = False,
    ):
        self.pipe = pipe
        self.device = torch.device(device)
        self.max_sequence_length = max_sequence_length
        offloaded = text_encoders(pipe) if offload_text_encoders else {}
        for module in self._modules():
            if module not in offloaded.values():
                module.to(self.device)
            module.eval().requires_grad_(False)
        for module in offloaded.values():
            cpu_offload(module, self.device)

    @classmethod
    def skeleton(
        cls,
        path: str,
        dtype: torch.dtype = torch.float32,
        max_sequence_length: int | None = None,
        images: int | None = None,
    ) -> Policy:
        """The policy of a folder or hub id made of its configs alone: every module is on the meta
        device, and `embed` returns the shapes of as many embeddings, with `images` condition images
        each (None: as many as the family takes, none where it needs none). UserError where the
        configs do not fit their classes."""
        policy = cls(
            skeleton_pipe(path, dtype),
            device="meta",
            max_sequence_length=max_sequence_length or cls.text_length,
        )
        least, most = cls.images_taken
        policy.images_taken = (least, (most if least else 0) if images is None else images)
        policy.ragged = cls.ragged_with(policy.images_taken[1])
        policy.embed = lambda examples: policy.empty_embeddings(len(examples))  # type: ignore[method-assign]  # a stand-in for this object alone
        return policy

    @classmethod
    def variant(cls, index: dict) -> type[Policy]:
        """The class of a checkpoint by its model_index.json, where models of one pipeline class
        differ."""
        return cls

    def _modules(self) -> list[torch.nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]

    # ------------------------------------------------------------------------------------- denoiser
    @classmethod
    def denoiser_parts(cls, index: dict) -> tuple[str, ...]:
        """The components that `join_denoiser` makes one module of, of a checkpoint with this
        model_index.json."""
        return ("transformer",)

    @staticmethod
    def join_denoiser(part: torch.nn.Module) -> torch.nn.Module:
        """One module of the `denoiser_parts` of a checkpoint."""
        return part

    def denoiser(self) -> torch.nn.Module:
        """The module that predicts velocities: what is trained, copied and saved, as one, also
        where it holds several experts."""
        return self.pipe.transformer

    def set_denoiser(self, module: torch.nn.Module) -> None:
        """Predict with another module of the same kind from now on."""
        self.pipe.register_modules(transformer=module)

    def expert(self, sigma: float) -> int:
        """Which of the denoiser's experts predicts rows at a noise level, counted from 0: rows of
        two share no forward of a rollout."""
        return 0

    def only(self, denoiser: Callable, expert: int) -> Callable:
        """A denoiser for rows of one expert, which it need not read from their noise levels: a
        captured forward cannot."""
        return denoiser

    @property
    def transformer(self) -> torch.nn.Module:
        """`denoiser()`, for those who know the family to have one transformer."""
        return self.denoiser()

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.denoiser().dtype)

    # --------------------------------------------------------------------------------- conditioning
    @abstractmethod
    def embed(self, examples: list[Example]) -> Conditioning:
        """Embeddings of n examples, [n, ...] each, in the policy's dtype on its device; of a
        `ragged` family n is 1. They depend on `identity` alone: not on the other examples of the
        call, and not on negative prompts, which are embedded as examples of their own
        (`opposed`)."""

    @classmethod
    def identity(cls, example: Example) -> tuple[str, ...]:
        """What the embedding of an example depends on: its text and its condition images.
        Embeddings are cached and stored by it."""
        return example.text, *example.image_digests

    @classmethod
    def opposed(cls, example: Example) -> Example | None:
        """What an example is guided away from: the same one with its negative prompt, or the
        family's default, for a text. None where the family takes no negative prompts."""
        if cls.default_negative_prompt is None:
            return None
        return replace(
            example,
            text=cls.default_negative_prompt if example.negative is None else example.negative,
            negative=None,
        )

    @classmethod
    def check_images(cls, example: Example, where: str) -> None:
        """UserError, which begins with `where`, for an example with fewer or more condition images
        than the family takes."""
        (least, most), given = cls.images_taken, len(example.images)
        if least <= given <= most:
            return
        family = cls.__name__.removesuffix("Policy")
        if most == 0:
            raise UserError(f"{where}: brings {_images(given)}, and {family} takes none, only text")
        wanted = _images(most) if least == most else f"{least} to {_images(most)}"
        raise UserError(f"{where}: brings {_images(given)}; {family} takes {wanted} with a prompt")

    @contextmanager
    def embedding_for(self, size: Size) -> Iterator[None]:
        """`embed` is for outputs of this size meanwhile."""
        before, self.size = self.size, size
        try:
            yield
        finally:
            self.size = before

    @classmethod
    def ragged_with(cls, images: int) -> bool:
        """Whether `ragged` is true of a run whose prompts bring so many condition images at
        most."""
        return cls.ragged

    def encode(self, examples: list[Example]) -> Conditioning:
        """All that `velocity` wants to know of n examples, [n, ...] each: their embeddings, and
        those of what they are guided away from."""
        return self.embed(examples)

    def encode_each(self, examples: list[Example]) -> Conditions:
        """What `encode` gives, of n examples whose embeddings may differ in shape."""
        return (
            Conditions.of([self.encode([example]) for example in examples])
            if self.ragged
            else Conditions.equal(self.encode(examples))
        )

    @classmethod
    def guides(cls, scale: float) -> bool:
        """Whether a guidance scale asks for the negative prompts, of a family that takes them."""
        return scale > 1

    # ------------------------------------------------------------------------------------- sampling
    @staticmethod
    @abstractmethod
    def size_multiple(vae_config: dict) -> int:
        """What height and width must be multiples of, in pixels."""

    @staticmethod
    def frame_step(vae_config: dict) -> int | None:
        """The model makes videos of one frame and any multiple of this many more; None: it makes
        images."""
        return None

    @abstractmethod
    def empty_embeddings(self, count: int) -> Conditioning:
        """What `embed` returns for `count` examples, uninitialised, without the text encoders being
        run; where shapes differ, for the longest ones."""

    def empty_conditioning(self, count: int) -> Conditioning:
        """What `encode` returns for such examples."""
        return self.empty_embeddings(count)

    @abstractmethod
    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one latent in the layout that the pipeline accepts as `latents=`; UserError for
        impossible sizes."""

    @abstractmethod
    def sigmas(self, num_steps: int, size: Size) -> torch.Tensor:
        """The sampling grid of the checkpoint's scheduler, fp32 [num_steps + 1] on the CPU, from 1
        to 0."""

    @abstractmethod
    def velocity(
        self,
        denoiser: torch.nn.Module,
        x: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: Conditioning,
        size: Size,
        guidance: float,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """v = denoiser(x, sigma) for a batch of rows, each at its own sigma; guided, where the
        family has guidance.

        x: [n, ...] of any float dtype, cast to `dtype` (default: the policy's).
        sigma: fp32 [n].
        guidance: the scale, as in the pipeline's call.
        Returns [n, ...] of `dtype`.
        """

    def finished(self, latents: torch.Tensor) -> torch.Tensor:
        """Final latents as the pipeline returns them with output_type="latent", where that is not
        how they are integrated."""
        return latents

    @abstractmethod
    def _decode(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        """What the VAE makes of final latents, about in [-1, 1], [n, 3, H, W]; families of videos
        return [n, 3, F, H, W]."""

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of final latents, uint8 [n, H, W, 3], or videos [n, F, H, W, 3], and which of them
        are finite, bool [n]; both on the device, which the host does not wait for.

        A video of one frame is an image. NaN or infinity in a latent, or in what the VAE makes of
        it, is no image: a cast to uint8 makes it a black one.
        """
        vae = getattr(getattr(self, "pipe", None), "vae", None)  # a policy may have none
        with decoding(vae):
            decoded = self._decode(latents, size)
        if decoded.ndim == 5 and size.frames == 1:
            decoded = decoded.squeeze(2)
        return finite_pixels(latents, decoded)

    def decode(self, latents: torch.Tensor, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """`pixels` as arrays; `no_image` stands for what is not finite, which rewards would score
        like any other image."""
        images, finite = (tensor.numpy() for tensor in Fetched(self.pixels(latents, size)).wait())
        return without_missing(images, finite), finite

    def at(self, size: Size, guidance_scale: float) -> Sampler:
        """The policy at one size and guidance scale."""
        return Sampler(self, size, guidance_scale)

    def sample(
        self,
        prompts: str | list[str],
        *,
        latents: torch.Tensor,
        height: int,
        width: int,
        num_steps: int,
        guidance_scale: float,
        negative_prompts: str | list[str] | None = None,
        images: Image.Image | list[Image.Image | list[Image.Image]] | None = None,
        frames: int | None = None,
        decode: bool = True,
    ) -> list[Image.Image] | list[list[Image.Image]] | torch.Tensor:
        """ODE sampling from given initial latents; equals the family's diffusers pipeline to 1e-5
        in fp32.

        prompts: n texts, or one.
        latents: [n, ...] in the layout that the pipeline accepts as `latents=`.
        guidance_scale: as in the pipeline's call; `Scales(first, second)` for a model of two
        experts.
        negative_prompts: n, or one for all, as the pipeline takes them; unused without guidance.
        images: condition images, for families that take them: n entries, each a PIL image or a list
            of PIL images; for one text its image or its list.
        frames: of a video, for families that make them. Returns n PIL images, or where `frames` is
        given, n lists of as many; with decode=False the final fp32 latents as the pipeline does
        with output_type="latent". What is not finite is warned of, and a checkerboard stands for
        it. Raises UserError for sizes, negative prompts, images or frames that the family does not
        take, ValueError for any other argument that is not as described, naming it.
        """
        alone, prompts = isinstance(prompts, str), as_prompts(prompts)
        negatives = as_negative_prompts(negative_prompts, len(prompts))
        conditions = as_images(images, len(prompts), alone)
        size = Size(
            positive_int("height", height),
            positive_int("width", width),
            positive_int("frames", 1 if frames is None else frames),
        )
        num_steps = positive_int("num_steps", num_steps, most=1000)
        scale = finite_number("guidance_scale", guidance_scale)
        sampler = self.at(size, guidance_scale if isinstance(guidance_scale, Scales) else scale)
        if guidance_scale > 1 and not self.takes_guidance:
            warnings.warn(
                f"guidance_scale: {guidance_scale:g} has no effect: this model is distilled and not"
                " guided",
                stacklevel=2,
            )
        check_latents(latents, (len(prompts), *sampler.latent_shape), str(size))
        if negatives is not None and self.default_negative_prompt is None:
            raise UserError(
                f"negative_prompts: {type(self).__name__} has its guidance built in and takes none"
            )
        examples = [
            Example(*given)
            for given in zip(prompts, negatives or [None] * len(prompts), conditions, strict=True)  # type: ignore[list-item]  # negatives may be None
        ]
        for n, example in enumerate(examples):
            self.check_images(example, f"images: prompt {n}")
        with self.embedding_for(size):
            encoded = self.encode_each(examples)
        final = sampler.integrate_each(latents.to(self.device, torch.float32), encoded, num_steps)
        if not decode:
            return self.finished(final)
        made, finite = sampler.decode(final)
        if not finite.all():
            what = "images" if size.frames == 1 else "videos"
            warnings.warn(
                f"{(~finite).sum()} of {len(finite)} {what} hold NaN or infinity; a checkerboard"
                " stands for each",
                stacklevel=2,
            )
        if frames is None:
            return [*map(Image.fromarray, made)]
        return [[*map(Image.fromarray, frames_of(item))] for item in made]
