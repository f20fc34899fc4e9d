"""Classifier-free guidance, for families whose velocity is made of two forwards: with the prompt and with a negative one.

Both halves go through the transformer as one batch of twice the rows, negative half first, so a row costs what two cost
elsewhere, and the gradient flows through both. The negative prompt's embeddings are part of the conditioning, under the
names of the prompt's with a prefix; a scale of 1 or less leaves them unused and runs one half, as diffusers does.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from tempflow.models.base import Conditioning, Policy

NEGATIVE = "negative_"


def against(positive: Conditioning, negative: Conditioning) -> Conditioning:
    """The conditioning of guided rows: embeddings of n prompts and of their n negative prompts."""
    return positive | {NEGATIVE + name: tensor for name, tensor in negative.items()}


class GuidedPolicy(Policy):
    """A family with classifier-free guidance. To write: `embed`, `_forward`, and `_combine` where it is not the plain one."""

    default_negative_prompt = ""

    @abstractmethod
    def _forward(
        self, transformer, x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, height: int, width: int
    ) -> torch.Tensor:
        """The transformer's own prediction of n rows without guidance. x: [n, ...], its dtype the transformer's."""

    def _combine(self, positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
        """The guided velocity of two predictions, [n, ...] each, in their dtype as the pipeline does."""
        return negative + scale * (positive - negative)

    def encode(self, prompts: list[str], negative_prompts: list[str] | None = None) -> Conditioning:
        if negative_prompts is None:  # embedded once; the rows share its storage
            shared = self.embed([self.default_negative_prompt])
            negative = {name: tensor.expand(len(prompts), *tensor.shape[1:]) for name, tensor in shared.items()}
        else:
            negative = self.embed(negative_prompts)
        return against(self.embed(prompts), negative)

    def velocity(self, transformer, x, sigma, conditioning, *, height, width, guidance_scale, dtype=None):
        dtype = dtype or self.dtype
        positive = {name: tensor for name, tensor in conditioning.items() if not name.startswith(NEGATIVE)}
        if guidance_scale > 1:
            both = {name: torch.cat([conditioning[NEGATIVE + name], tensor]) for name, tensor in positive.items()}
            x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        else:
            both = positive
        both = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in both.items()}
        predicted = self._forward(transformer, x.to(dtype), sigma, both, height, width)
        if guidance_scale > 1:
            negative, positive = predicted.chunk(2)
            return self._combine(positive, negative, guidance_scale)
        return predicted
