"""Fused SDE step, log-probability and GRPO loss."""

from .ops import GroupStats, group_loss, normal, sde_step

__all__ = ["GroupStats", "group_loss", "normal", "sde_step"]
