"""Plans decide which latents an iteration integrates, where each one starts, and at which steps it
takes noise."""

from tempflow.sampling.plans.base import Plan

__all__ = ["Plan"]
