"""Classifier-free guidance, for families whose velocity is made of two forwards: with the prompt
and with a negative one.

Both halves go through the transformer as one batch of twice the rows, negative half first, so a row
costs what two cost elsewhere, and the gradient flows through both. Where the shapes of two halves
may differ they are two forwards, for every prompt, but one again through an engine of ZeRO-3: a
forward there is a collective, so their number must not depend on which prompts a rank has, and
DeepSpeed takes no second one before the backward. The negative prompt's embeddings are part of the
conditioning, under the names of the prompt's with a prefix; a scale that does not guide (1 or less,
as in diffusers) leaves them unused and runs one half.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch

from tempflow.models.base import Policy
from tempflow.models.conditions import Conditioning, index_rows
from tempflow.types import Example, Size

NEGATIVE = "negative_"


# a conditioning of rows of two shapes, where a family's `_forward` takes it
Joined = dict[str, torch.Tensor | list[torch.Tensor]]


def with_negatives(positive: Conditioning, negative: Conditioning) -> Conditioning:
    """The conditioning of guided rows: embeddings of n examples and of what each of them is guided
    away from."""
    return positive | {NEGATIVE + name: tensor for name, tensor in negative.items()}


class GuidedPolicy(Policy):
    """A family with classifier-free guidance. To write: `embed`, `_forward`, `_combine` where it is
    not the plain one, and `_join` where the negative prompt's embeddings may have another shape.

    halves_alike: of a `ragged` family, whether a negative prompt's embeddings have the shapes of
    the prompt's, whatever the two say.
    joins_lengths: whether `_join` takes halves of different lengths. Guidance at ZeRO stage 3 is
    refused at the start of a run where it does not.
    """

    default_negative_prompt = ""
    halves_alike = False
    joins_lengths = True

    @abstractmethod
    def _forward(
        self, denoiser, x: torch.Tensor, sigma: torch.Tensor, conditioning: Joined, size: Size
    ) -> torch.Tensor:
        """The denoiser's own prediction of n rows without guidance. x: [n, ...], its dtype the
        denoiser's."""

    def _combine(
        self, positive: torch.Tensor, negative: torch.Tensor, scale: float | torch.Tensor
    ) -> torch.Tensor:
        """The guided velocity of two predictions, [n, ...] each, in their dtype as the pipeline
        does."""
        return negative + scale * (positive - negative)

    def _scale(
        self, guidance: float, sigma: torch.Tensor, dtype: torch.dtype
    ) -> float | torch.Tensor:
        """What `_combine` scales by: a number, or one for each of n rows, [n, 1, ...] of `dtype`.
        sigma: of the rows, fp32 [n]."""
        return guidance

    def _join(self, negative: Conditioning, positive: Conditioning) -> Joined:
        """The conditionings of n rows each as that of one forward of 2n rows."""
        return {name: torch.cat([negative[name], tensor]) for name, tensor in positive.items()}

    def encode(self, examples: list[Example]) -> Conditioning:
        opposed = [cast(Example, self.opposed(example)) for example in examples]
        distinct = {self.identity(example): example for example in opposed}  # most often one
        places = {identity: n for n, identity in enumerate(distinct)}
        negative = index_rows(
            self.embed(list(distinct.values())),
            [places[self.identity(example)] for example in opposed],
        )
        return with_negatives(self.embed(examples), negative)

    def empty_conditioning(self, count: int) -> Conditioning:
        return with_negatives(self.empty_embeddings(count), self.empty_embeddings(count))

    def velocity(self, denoiser, x, sigma, conditioning, size, guidance, dtype=None):
        dtype = dtype or self.dtype
        positive = {
            name: tensor for name, tensor in conditioning.items() if not name.startswith(NEGATIVE)
        }

        def forward(x: torch.Tensor, sigma: torch.Tensor, given: Joined) -> torch.Tensor:
            return self._forward(
                denoiser,
                x.to(dtype),
                sigma,
                {name: _cast(value, dtype) for name, value in given.items()},
                size,
            )

        if not self.guides(guidance):
            return forward(x, sigma, positive)
        scale = self._scale(guidance, sigma, dtype)
        negative = {name: conditioning[NEGATIVE + name] for name in positive}
        if self.ragged and not self.halves_alike and not _sharded(denoiser):
            opposed = forward(x, sigma, negative)
            return self._combine(forward(x, sigma, positive), opposed, scale)
        both = self._join(negative, positive)
        opposed, predicted = forward(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return self._combine(predicted, opposed, scale)


def _cast(
    value: torch.Tensor | list[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor | list[torch.Tensor]:
    """In another dtype, where it holds floating-point numbers."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return [cast(one) for one in value] if isinstance(value, list) else cast(value)


def _sharded(denoiser) -> bool:
    """Whether it is a DeepSpeed engine of ZeRO-3."""
    asked = getattr(denoiser, "zero_optimization_partition_weights", None)
    return asked is not None and asked()
