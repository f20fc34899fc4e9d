"""A policy at one size and guidance scale, and the ODE along its grid.

The scheduler of rollouts, the updater and evaluations see a policy only through a `Sampler`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tempflow.models.conditions import Conditioning, Conditions, by_shape
from tempflow.sampling.steps import ode_coefficients
from tempflow.transfer import send
from tempflow.types import Size
from tempflow_kernels import sde_step

if TYPE_CHECKING:
    from tempflow.models.base import Policy


@dataclass(frozen=True)
class Sampler:
    """A policy at one size and guidance scale."""

    policy: Policy
    size: Size
    """Size of the outputs."""
    guidance_scale: float
    """As in the pipeline's call; `Scales` where a second expert has a scale of its own."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, as `Policy.latent_shape`."""
        return self.policy.latent_shape(self.size)

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The sampling grid: fp32 [num_steps + 1] on the CPU, falling from 1 to 0."""
        return self.policy.sigmas(num_steps, self.size)

    def velocity(
        self,
        transformer,
        x: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: Conditioning,
        dtype=None,
    ) -> torch.Tensor:
        """The velocity of a batch of rows, as `Policy.velocity`."""
        return self.policy.velocity(
            transformer, x, sigma, conditioning, self.size, self.guidance_scale, dtype
        )

    def pixels(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images or videos on the device and which of them are finite, as `Policy.pixels`."""
        return self.policy.pixels(latents, self.size)

    def decode(self, latents: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The same as arrays in host memory, as `Policy.decode`."""
        return self.policy.decode(latents, self.size)

    @torch.no_grad()
    def integrate(
        self, x: torch.Tensor, conditioning: Conditioning, num_steps: int
    ) -> torch.Tensor:
        """Integrate the ODE from sigma 1 to 0 with the policy's own denoiser.

        Args:
            x: latents at sigma 1, fp32 [n, ...].
            conditioning: as `Policy.encode` returns it, [n, ...] each.
            num_steps: steps of the grid.

        Returns:
            Final latents, fp32 [n, ...].
        """
        sigmas = self.sigmas(num_steps)
        grid = ode_coefficients(sigmas)
        # `sde_step` takes keys always; with tau = 0 it draws no noise from them.
        no_key = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        numbers = {"sigma": sigmas, "a": grid.a, "b": grid.b, "tau": grid.tau}
        # All numbers of the grid in one copy: a copy in each step would make the host wait for the
        # steps before it.
        (there,) = send([numbers], x.device)
        for k in range(num_steps):
            sigma, a, b, tau = (there[name][k].expand(len(x)) for name in numbers)
            # From the grid on the CPU, so that choosing an expert does not read from the device.
            denoiser = self.policy.only(
                self.policy.denoiser(), self.policy.expert(sigmas[k].item())
            )
            v = self.velocity(denoiser, x, sigma, conditioning)
            x = sde_step(x, v, a, b, tau, key=no_key)[0][:, 0]
        return x

    def integrate_each(
        self, x: torch.Tensor, conditions: Conditions, num_steps: int
    ) -> torch.Tensor:
        """`integrate` for rows whose conditionings may differ in shape; rows of one shape are
        integrated together."""
        groups = by_shape(conditions.shapes)
        # Rows of one shape, the common case, are not gathered: that would copy the latents.
        parts = [
            self.integrate(x if len(groups) == 1 else x[places], conditions.rows(places), num_steps)
            for places in groups
        ]
        if len(parts) == 1:
            return parts[0]
        final = torch.empty_like(x)
        for places, part in zip(groups, parts, strict=True):
            final[places] = part
        return final
