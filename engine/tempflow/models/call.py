"""`Policy.sample`: a policy called like a diffusers pipeline, with texts and images of any origin.

Arguments are checked and made into examples here; embedding, integration and decoding are the
policy's and the sampler's.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Sequence, cast

import numpy as np
import torch
from PIL import Image

from tempflow.errors import UserError
from tempflow.media import frames_of
from tempflow.models.arguments import (
    as_images,
    as_negative_prompts,
    as_prompts,
    check_latents,
    finite_number,
    positive_int,
)
from tempflow.types import Example, Scales, Size

if TYPE_CHECKING:
    from tempflow.models.base import Policy


class PipelineCall:
    """The part of `Policy` that is called like a pipeline."""

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
        """Sample by the ODE from given initial latents. In fp32 the result equals that of the
        family's diffusers pipeline up to 1e-5.

        An output with NaN or infinity is replaced by a checkerboard, with a warning.

        Args:
            prompts: n texts, or one.
            latents: initial noise, [n, ...], in the layout that the pipeline accepts as `latents=`.
            height: in pixels.
            width: in pixels.
            num_steps: steps of the grid, 1 to 1000.
            guidance_scale: as in the pipeline's call; `Scales(first, second)` for a model of two
                experts.
            negative_prompts: n texts, or one for all; unused without guidance. Default: none.
            images: condition images, for families that take them: n entries, each a PIL image or a
                list of PIL images; for a single text its image or its list. Default: none.
            frames: frames of a video, for families that make videos; default: images.
            decode: False returns latents instead of images.

        Returns:
            n PIL images; with `frames`, n lists of that many PIL images; with decode=False the
            final fp32 latents, as the pipeline returns them with output_type="latent".

        Raises:
            UserError: a size, negative prompt, image or frame count that the family does not take.
            ValueError: any other argument that is not as described; the message names it.
        """
        policy = cast("Policy", self)
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
        sampler = policy.at(size, guidance_scale if isinstance(guidance_scale, Scales) else scale)
        if guidance_scale > 1 and not policy.takes_guidance:
            warnings.warn(
                f"guidance_scale: {guidance_scale:g} has no effect, because this model is distilled"
                " to run without guidance",
                stacklevel=2,
            )
        check_latents(latents, (len(prompts), *sampler.latent_shape), str(size))
        examples = _examples(policy, prompts, negatives, conditions)
        with policy.embedding_for(size):
            encoded = policy.encode_each(examples)
        final = sampler.integrate_each(latents.to(policy.device, torch.float32), encoded, num_steps)
        if not decode:
            return policy.finished(final)
        made, finite = sampler.decode(final)
        if not finite.all():
            what = "images" if size.frames == 1 else "videos"
            warnings.warn(
                f"{(~finite).sum()} of {len(finite)} {what} hold NaN or infinity and are replaced"
                " by a checkerboard",
                stacklevel=2,
            )
        if frames is None:
            return [*map(Image.fromarray, made)]
        return [[*map(Image.fromarray, frames_of(item))] for item in made]


def _examples(
    policy: Policy,
    prompts: list[str],
    negatives: list[str] | None,
    conditions: list[tuple[np.ndarray, ...]],
) -> list[Example]:
    """The examples of a call of `sample`. UserError for negative prompts or images that the
    family does not take."""
    if negatives is not None and policy.default_negative_prompt is None:
        raise UserError(
            f"negative_prompts: {type(policy).__name__} takes none, because it is not guided by a"
            " second prediction"
        )
    against: Sequence[str | None] = negatives or [None] * len(prompts)
    examples = [Example(*given) for given in zip(prompts, against, conditions, strict=True)]
    for n, example in enumerate(examples):
        policy.check_images(example, f"images: prompt {n}")
    return examples
