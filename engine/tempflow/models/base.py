"""`Policy`: what the engine needs to know about a model family.

A policy owns the frozen parts of a pipeline (text encoders, VAE, scheduler) and one copy of the
denoiser. `velocity` takes the denoiser as an argument, because training, rollouts and the reference
evaluate different copies of it. `Policy.at` gives a `Sampler`, which fixes the size and the
guidance scale of a run; `Policy.sample` is in call.py. Training, noise and rewards are not known
here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Iterator, cast

import numpy as np
import torch
from accelerate import cpu_offload

from tempflow.errors import UserError, counted
from tempflow.media import without_missing
from tempflow.models.call import PipelineCall
from tempflow.models.conditions import Conditioning, Conditions
from tempflow.models.pixels import decoding, finite_pixels
from tempflow.models.sampler import Sampler
from tempflow.models.skeleton import skeleton_pipe
from tempflow.transfer import Fetched
from tempflow.types import Example, Size


def text_encoders(pipe: Any) -> dict[str, torch.nn.Module]:
    """The loaded text encoders of a pipeline, by component name."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, torch.nn.Module)
    }


def most_images(examples: list[Example]) -> int:
    """The largest number of condition images that any of the examples has."""
    return max((len(example.images) for example in examples), default=0)


def _images(count: int) -> str:
    return counted(count, "image") if count else "no images"


class Policy(PipelineCall, ABC):
    """A flow-matching model of images or videos of one family, loaded from a diffusers folder.

    A new family subclasses it and implements the abstract methods; the class attributes describe
    the family to code that has loaded no model.

    Args:
        pipe: the diffusers pipeline. Its modules are moved to `device` and frozen.
        device: where modules and latents are.
        max_sequence_length: text tokens of an embedding, at most `longest_text`.
        offload_text_encoders: keep the weights of text encoders in host memory; each layer is
            copied to the device for its own forward.
    """

    lora_targets: tuple[str, ...]
    """Ends of the names of the linear layers that LoRA adapts by default."""
    schedulers: tuple[str, ...] = ("FlowMatchEulerDiscreteScheduler",)
    """Scheduler classes whose grid `sigmas` can make."""
    text_length: int
    """Default of `max_sequence_length`, as in the family's pipeline."""
    longest_text: int
    """Largest `max_sequence_length`."""
    default_negative_prompt: str | None = None
    """Negative prompt of training and evaluation for prompts that have none; None for a family that
    takes no negative prompts."""
    masks_text = False
    """Whether the attention is given a mask of the text."""
    embeds_with: tuple[str, ...] = ()
    """Components that `embed` uses besides text encoders, tokenizers and processors, such as the
    VAE of a family that encodes condition images."""
    takes_guidance = True
    """Whether the guidance scale has an effect."""
    images_taken: tuple[int, int] = (0, 0)
    """Smallest and largest number of condition images of one example."""
    ragged = False
    """Whether the embeddings of two examples may differ in shape. If so, examples are embedded one
    at a time, and rows share a forward only with rows of the same shape."""
    sized = False
    """Whether embeddings depend on the size of the outputs, for example because condition images
    are scaled to it. If so, `embed` makes them for `self.size`."""
    size: Size | None = None
    """The size that `embed` works for, where `sized` is true."""

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
            # Frozen and without dropout, also the denoiser: training unfreezes what it trains, and
            # a forward with dropout would differ between rollout and training.
            module.eval().requires_grad_(False)
        # accelerate's hooks and not diffusers' group offloading: T5's blocks are nested deeper than
        # its block level looks.
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
        """The policy of a checkpoint without weights, for estimates of memory and time.

        All modules are on the meta device, and `embed` returns tensors that have shapes and no
        values.

        Args:
            path: folder or hub id; only its configs are read.
            dtype: of the modules.
            max_sequence_length: text tokens; default: `text_length`.
            images: condition images of each example. The default is the largest number that the
                family takes if it cannot do without images, else 0.

        Raises:
            UserError: a config does not fit its class.
        """
        policy = cls(
            skeleton_pipe(path, dtype),
            device="meta",
            max_sequence_length=max_sequence_length or cls.text_length,
        )
        least, most = cls.images_taken
        # These and `embed` are set on the object, because other objects of the family have other
        # images, and encoders.
        policy.images_taken = (least, (most if least else 0) if images is None else images)
        policy.ragged = cls.ragged_with(policy.images_taken[1])
        vars(policy).update(embed=lambda examples: policy.empty_embeddings(len(examples)))
        return policy

    @classmethod
    def variant(cls, index: dict) -> type[Policy]:
        """The policy class of a checkpoint with this model_index.json. Overridden where checkpoints
        of one pipeline class need different policies."""
        return cls

    def _modules(self) -> list[torch.nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]

    # ------------------------------------------------------------------------------------- denoiser
    @classmethod
    def denoiser_parts(cls, index: dict) -> tuple[str, ...]:
        """Names of the components that make up the denoiser of a checkpoint with this
        model_index.json; `join_denoiser` takes them in this order."""
        return ("transformer",)

    @staticmethod
    def join_denoiser(part: torch.nn.Module) -> torch.nn.Module:
        """One module that holds all `denoiser_parts` of a checkpoint."""
        return part

    def denoiser(self) -> torch.nn.Module:
        """The module that predicts velocities. It is trained, copied and saved as one module, even
        if it holds several experts."""
        return self.pipe.transformer

    def set_denoiser(self, module: torch.nn.Module) -> None:
        """Replace the denoiser by another module of the same kind."""
        # Registered, so that the pipeline calls and saves it too.
        self.pipe.register_modules(transformer=module)

    def expert(self, sigma: float) -> int:
        """Number of the expert that predicts at a noise level, from 0. Rows of different experts
        share no forward in a rollout."""
        return 0

    def only(self, denoiser: Callable, expert: int | list[int]) -> Callable:
        """The denoiser for rows that all belong to one expert, or for rows whose experts are
        listed. It does not read the noise levels to choose the expert: the host would wait for
        them, and a forward in a CUDA graph cannot."""
        return denoiser

    @property
    def transformer(self) -> torch.nn.Module:
        """`denoiser()`, for callers of a family with a single transformer."""
        return self.denoiser()

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.denoiser().dtype)

    # --------------------------------------------------------------------------------- conditioning
    @abstractmethod
    def embed(self, examples: list[Example]) -> Conditioning:
        """Embed the texts and condition images of n examples.

        The result of an example depends on its `identity` only: not on the other examples of the
        call, and not on its negative prompt, which is embedded as an example of its own
        (`opposed`).

        Args:
            examples: n examples; a `ragged` family is given one at a time.

        Returns:
            The inputs of the denoiser by name, [n, ...] each, in the policy's dtype (masks in bool)
            on its device.
        """

    @classmethod
    def identity(cls, example: Example) -> tuple[str, ...]:
        """Everything that the embedding of an example depends on: its text and the digests of its
        condition images. It is the key of cached and stored embeddings."""
        return example.text, *example.image_digests

    @classmethod
    def opposed(cls, example: Example) -> Example | None:
        """The example that guidance steers away from: the same one with its negative prompt, or
        else the family's default, as its text. None if the family takes no negative prompts."""
        if cls.default_negative_prompt is None:
            return None
        return replace(
            example,
            text=cls.default_negative_prompt if example.negative is None else example.negative,
            negative=None,
        )

    @classmethod
    def check_images(cls, example: Example, where: str) -> None:
        """Raise a UserError, which begins with `where`, if an example has fewer or more condition
        images than the family takes."""
        (least, most), given = cls.images_taken, len(example.images)
        if least <= given <= most:
            return
        family = cls.__name__.removesuffix("Policy")
        if most == 0:
            raise UserError(
                f"{where}: has {_images(given)}, but {family} takes text only; remove the images"
            )
        wanted = _images(most) if least == most else f"{least} to {_images(most)}"
        raise UserError(f"{where}: has {_images(given)}; {family} takes {wanted} with a prompt")

    @contextmanager
    def embedding_for(self, size: Size) -> Iterator[None]:
        """Inside the context, `embed` works for outputs of this size."""
        before, self.size = self.size, size
        try:
            yield
        finally:
            self.size = before

    @classmethod
    def takes_guidance_with(cls, transformer: dict) -> bool:
        """The value of `takes_guidance` for a checkpoint whose transformer has this config."""
        return cls.takes_guidance

    @classmethod
    def ragged_with(cls, images: int) -> bool:
        """The value of `ragged` for a run whose examples have at most this many condition
        images."""
        return cls.ragged

    def encode(self, examples: list[Example]) -> Conditioning:
        """The conditioning that `velocity` takes for n examples, [n, ...] each: their embeddings
        and, with classifier-free guidance, those of their negative prompts."""
        return self.embed(examples)

    def encode_each(self, examples: list[Example]) -> Conditions:
        """The same as `encode`, for n examples whose embeddings may differ in shape."""
        return (
            Conditions.of([self.encode([example]) for example in examples])
            if self.ragged
            else Conditions.equal(self.encode(examples))
        )

    @classmethod
    def guides(cls, scale: float) -> bool:
        """Whether a guidance scale makes a family with negative prompts use them."""
        return scale > 1  # as in diffusers' pipelines

    # ------------------------------------------------------------------------------------- sampling
    @staticmethod
    @abstractmethod
    def size_multiple(vae_config: dict) -> int:
        """The number of pixels that height and width must be multiples of."""

    @staticmethod
    def frame_step(vae_config: dict) -> int | None:
        """For a model of videos, whose number of frames is 1 plus a multiple of this; None for a
        model of images."""
        return None

    @abstractmethod
    def empty_embeddings(self, count: int) -> Conditioning:
        """Uninitialized tensors in the shapes that `embed` returns for `count` examples, without
        running the text encoders. If shapes vary, those of the longest examples."""

    def empty_conditioning(self, count: int) -> Conditioning:
        """The same for `encode`."""
        return self.empty_embeddings(count)

    @abstractmethod
    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one latent, in the layout that the pipeline accepts as `latents=`.

        Raises:
            UserError: the model cannot make this size.
        """

    @abstractmethod
    def sigmas(self, num_steps: int, size: Size) -> torch.Tensor:
        """The sampling grid of the checkpoint's scheduler: fp32 [num_steps + 1] on the CPU, falling
        from 1 to 0."""

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
        """The velocity dx/d sigma of a batch of rows, each at its own sigma, with guidance applied.

        Gradients flow through both predictions of classifier-free guidance.

        Args:
            denoiser: the copy to evaluate: a module, or a DeepSpeed engine around one.
            x: latents, [n, ...], of any float dtype; cast to `dtype` before the denoiser.
            sigma: fp32 [n].
            conditioning: as `encode` returns it, [n, ...] each.
            size: of the outputs.
            guidance: the scale, as in the pipeline's call.
            dtype: of the denoiser's inputs; default: the policy's.

        Returns:
            [n, ...] in `dtype`.
        """

    def finished(self, latents: torch.Tensor) -> torch.Tensor:
        """Final latents as the pipeline returns them with output_type="latent". Overridden where
        that layout differs from the one that is integrated."""
        return latents

    @abstractmethod
    def _decode(self, latents: torch.Tensor, size: Size) -> torch.Tensor:
        """Decode final latents with the VAE: about in [-1, 1], [n, 3, H, W], or [n, 3, F, H, W]
        for a family of videos."""

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Images or videos of final latents, and which of them are finite.

        A cast to uint8 would turn NaN into a black image that rewards score like any other, so the
        second tensor marks the outputs whose latent or decoded values hold NaN or infinity.

        Args:
            latents: final latents, [n, ...].
            size: of the outputs. A video of one frame is returned as an image.

        Returns:
            uint8 [n, H, W, 3] or [n, F, H, W, 3], and bool [n]: True where finite. Both are on the
            device; the host does not wait for them.
        """
        # A policy of your own may have no diffusers pipeline.
        vae = getattr(getattr(self, "pipe", None), "vae", None)
        with decoding(vae):
            decoded = self._decode(latents, size)
        # Rewards of images get images from a model of videos, too.
        if decoded.ndim == 5 and size.frames == 1:
            decoded = decoded.squeeze(2)
        return finite_pixels(latents, decoded)

    def decode(self, latents: torch.Tensor, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """`pixels` as arrays in host memory, with a checkerboard (`media.no_image`) in place of
        each output that is not finite."""
        # Both tensors are copied to the host together, so it waits once.
        images, finite = (tensor.numpy() for tensor in Fetched(self.pixels(latents, size)).wait())
        return without_missing(images, finite), finite

    def at(self, size: Size, guidance_scale: float) -> Sampler:
        """The policy at one size and guidance scale."""
        return Sampler(self, size, guidance_scale)
