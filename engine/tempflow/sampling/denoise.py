"""A forward of the transformer and the sampling step after it, as one function of tensors.

Everything that differs from batch to batch is a tensor argument, so a CUDA graph can capture the
function.
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
    """Velocities and steps of a transformer, for some prompts at one size and guidance scale."""

    sampler: Sampler
    transformer: Any
    """The copy of the denoiser that rollouts use."""
    conditioning: Conditions
    """The conditionings of the prompts."""
    places: dict[int, int]
    """Each prompt's place in `conditioning`, by its `Unit.prompt_id`."""
    coarse_transformer: Any = None
    """Another copy for the coarse steps of a suffix; None if they use `transformer`."""
    expert: int = 0
    """Number of the expert that predicts the rows of a launch, if the denoiser has several."""

    @property
    def device(self) -> torch.device:
        """The device of latents and conditioning."""
        return self.sampler.policy.device

    def within(self, unit: Unit) -> int:
        """The place of a unit's prompt among the prompts whose conditioning has the same shape."""
        return self.conditioning.within[self.places[unit.prompt_id]]

    def conditions(self, shape: Shape, within: torch.Tensor) -> Conditioning:
        """The conditioning [n, ...] of rows, gathered on the device.

        Args:
            shape: of the conditioning of all n rows.
            within: the place of each row's prompt, as the method `within` gives it, int64 [n] on
                the device.
        """
        return index_rows(self.conditioning.stacks[shape], within)

    def shape(self, unit: Unit) -> Shape:
        """The shape of the conditioning of a unit's prompt. Rows of different shapes share no
        forward."""
        return self.conditioning.shapes[self.places[unit.prompt_id]]

    def of(self, expert: int) -> Denoise:
        """The same for rows of another expert."""
        # A field and not an argument of `step`: a captured function takes tensors only.
        return self if expert == self.expert else replace(self, expert=expert)

    def step(self, **inputs):
        """One forward and the step after it, for a batch of rows.

        Takes the tensors that `_step_along` lists, by name: latents x fp32 [n, ...], scalars fp32
        [n], key int64 [n, 1], and the conditioning.

        Returns:
            The velocity [n, ...], the next latents fp32 [n, 1, ...], and their log-probabilities
            fp32 [n, 1].
        """
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
        # A suffix of order 2 steps with a corrected velocity. v itself is returned uncorrected and
        # in its dtype: children that branch off here are stepped with it, as training sees it.
        if v_before is not None:
            used = v.float() + bend.reshape(-1, *[1] * (v.ndim - 1)) * (v.float() - v_before)
            x = x - extrapolated
        return v, *sde_step(x, used, a, b, tau, key=key, children=1, out_dtype=torch.float32)
