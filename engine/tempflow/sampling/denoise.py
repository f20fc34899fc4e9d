"""A forward of the transformer and the sampling step that follows it, as functions of tensors
alone.

That is what a CUDA graph can capture: everything that differs from batch to batch is an input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tempflow.models import Conditioning, Conditions, Sampler, Shape, index_rows
from tempflow.types import Unit
from tempflow_kernels import sde_step


@dataclass(frozen=True)
class Denoise:
    """The velocity of a transformer for some prompts at one image size and guidance scale."""

    sampler: Sampler
    transformer: Any
    conditioning: Conditions
    """Of the prompts."""
    places: dict[int, int]
    """A prompt's place among them, by its `Unit.prompt_id`."""
    coarse_transformer: Any = None
    """Used in the coarse steps of a suffix, where it is another one."""
    expert: int = 0
    """The one that predicts the rows of a launch, of a denoiser of several."""

    @property
    def device(self) -> torch.device:
        """Of latents and conditioning."""
        return self.sampler.policy.device

    def within(self, unit: Unit) -> int:
        """The place of a unit's prompt among those whose conditioning has its shape."""
        return self.conditioning.within[self.places[unit.prompt_id]]

    def conditions(self, shape: Shape, within: torch.Tensor) -> Conditioning:
        """Embeddings [n, ...] of prompts of one shape, gathered on the device by their places
        there, int64 [n]."""
        return index_rows(self.conditioning.stacks[shape], within)

    def shape(self, unit: Unit) -> Shape:
        """Of the conditioning of a unit's prompt: rows share a forward with rows of the same."""
        return self.conditioning.shapes[self.places[unit.prompt_id]]

    def of(self, expert: int) -> Denoise:
        """The same for rows of an expert."""
        return self if expert == self.expert else replace(self, expert=expert)

    def step(self, **inputs):
        """One launch of everything: the velocity [n, ...], the next latents fp32 [n, 1, ...], their
        log-probabilities [n, 1]."""
        return self._step_along(self.transformer, **inputs)

    def coarse_step(self, **inputs):
        """The same with `coarse_transformer`."""
        return self._step_along(self.coarse_transformer, **inputs)

    def _step_along(
        self,
        transformer,
        x,
        sigma,
        a,
        b,
        tau,
        key,
        v_before=None,
        bend=None,
        extrapolated=None,
        **conditioning,
    ):
        v = self.sampler.velocity(
            self.sampler.policy.only(transformer, self.expert), x, sigma, conditioning
        )
        used = v
        if v_before is not None:  # v itself stays in its dtype, as training will see it
            used = v.float() + bend.reshape(-1, *[1] * (v.ndim - 1)) * (v.float() - v_before)
            x = x - extrapolated
        return v, *sde_step(x, used, a, b, tau, key=key, children=1, out_dtype=torch.float32)
