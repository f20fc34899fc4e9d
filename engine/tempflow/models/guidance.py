"""Classifier-free guidance, for families whose velocity combines two predictions: one with the
prompt and one with a negative prompt.

Both halves go through the transformer as one batch of twice the rows, the negative half first, so a
row costs twice as much as without guidance, and the gradient flows through both.

If the shapes of the two halves may differ, they are two forwards, for every prompt. Through an
engine of ZeRO stage 3 they are one forward all the same: a forward there is a collective, so the
number of forwards must not depend on the prompts that a rank has, and DeepSpeed allows one forward
for each backward.

The negative prompt's embeddings are part of the conditioning, under the names of the prompt's with
a prefix. A scale that does not guide (1 or less, as in diffusers) leaves them unused and runs the
positive half alone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch

from tempflow.models.base import Policy
from tempflow.models.conditions import Conditioning, index_rows
from tempflow.types import Example, Size

NEGATIVE = "negative_"  # prefix of the names of a negative prompt's embeddings


# A conditioning whose rows may have two shapes: a list of rows, if a family's `_forward` takes one.
Joined = dict[str, torch.Tensor | list[torch.Tensor]]


def with_negatives(positive: Conditioning, negative: Conditioning) -> Conditioning:
    """The conditioning of guided rows, from the embeddings of n examples and those of the n
    examples that they are guided away from."""
    return positive | {NEGATIVE + name: tensor for name, tensor in negative.items()}


class GuidedPolicy(Policy):
    """A family with classifier-free guidance.

    A subclass writes `embed` and `_forward`; `_combine` if the pipeline does not combine the two
    predictions in the usual way; and `_join` if a negative prompt's embeddings may have another
    shape than the prompt's.
    """

    default_negative_prompt = ""
    halves_alike = False
    """For a `ragged` family: whether a negative prompt's embeddings always have the shapes of the
    prompt's."""
    joins_lengths = True
    """Whether `_join` takes halves of different lengths. If not, a run with guidance at ZeRO
    stage 3 is refused at the start."""

    @abstractmethod
    def _forward(
        self, denoiser, x: torch.Tensor, sigma: torch.Tensor, conditioning: Joined, size: Size
    ) -> torch.Tensor:
        """The denoiser's velocity of n rows without guidance.

        Args:
            denoiser: as in `velocity`.
            x: latents [n, ...], already in the denoiser's dtype.
            sigma: fp32 [n].
            conditioning: of these rows, in the same dtype, without negative embeddings.
            size: of the outputs.

        Returns:
            [n, ...] in the dtype of `x`.
        """

    def _combine(
        self, positive: torch.Tensor, negative: torch.Tensor, scale: float | torch.Tensor
    ) -> torch.Tensor:
        """The guided velocity of two predictions, [n, ...] each, computed in their dtype as the
        pipeline does."""
        return negative + scale * (positive - negative)

    def _scale(
        self, guidance: float, sigma: torch.Tensor, dtype: torch.dtype
    ) -> float | torch.Tensor:
        """The scale that `_combine` is given: a number, or [n, 1, ...] of `dtype` with one for each
        row.

        Args:
            guidance: as in `velocity`.
            sigma: of the rows, fp32 [n].
            dtype: of the predictions.
        """
        return guidance

    def _join(self, negative: Conditioning, positive: Conditioning) -> Joined:
        """The conditioning of one forward of 2n rows, from those of its halves of n rows."""
        return {name: torch.cat([negative[name], tensor]) for name, tensor in positive.items()}

    def encode(self, examples: list[Example]) -> Conditioning:
        opposed = [cast(Example, self.opposed(example)) for example in examples]
        # Each negative prompt is embedded once; most often all examples have the same.
        distinct = {self.identity(example): example for example in opposed}
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
        # Decided by the family and not by the shapes at hand, so that all prompts are computed in
        # the same way, whether the lengths of the two halves happen to agree or not.
        if self.ragged and not self.halves_alike and not _sharded(denoiser):
            opposed = forward(x, sigma, negative)
            return self._combine(forward(x, sigma, positive), opposed, scale)
        both = self._join(negative, positive)
        opposed, predicted = forward(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return self._combine(predicted, opposed, scale)


def _cast(
    value: torch.Tensor | list[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor | list[torch.Tensor]:
    """The tensor or tensors in another dtype. Masks, which are bool, stay as they are."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return [cast(one) for one in value] if isinstance(value, list) else cast(value)


def _sharded(denoiser) -> bool:
    """Whether the denoiser is a DeepSpeed engine of ZeRO stage 3."""
    # By the method that only its engines have, so that rollouts need not import DeepSpeed.
    asked = getattr(denoiser, "zero_optimization_partition_weights", None)
    return asked is not None and asked()
