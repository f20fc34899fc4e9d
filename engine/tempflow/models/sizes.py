"""Arithmetic of output sizes that several families share: which sizes a model can make, and how a
size shifts its sampling grid."""

from __future__ import annotations

from tempflow.errors import UserError
from tempflow.types import Size


def check_multiple(size: Size, multiple: int, frame_step: int | None = None) -> None:
    """Raise a UserError for a size that a model cannot make.

    Args:
        size: of the outputs.
        multiple: as `Policy.size_multiple` returns it.
        frame_step: as `Policy.frame_step` returns it.
    """
    if size.height % multiple or size.width % multiple:
        raise UserError(
            f"rollout.height, rollout.width: {size}; both must be multiples of {multiple} pixels"
        )
    if frame_step is None and size.frames != 1:
        raise UserError(
            f"rollout.frames: {size.frames}; this model makes images, so only 1 is allowed"
        )
    if frame_step and (over := (size.frames - 1) % frame_step):
        below = size.frames - over
        raise UserError(
            f"rollout.frames: {size.frames}; this model makes one frame more than a multiple of"
            f" {frame_step}, such as {below} or {below + frame_step}"
        )


def resolution_shift(scheduler, length: int, max_shift: float) -> float:
    """The shift mu of a scheduler with dynamic shifting.

    Args:
        scheduler: of the checkpoint.
        length: tokens of an image.
        max_shift: default of the config's key of that name. It is an argument because diffusers'
            pipelines differ in it.
    """
    config = scheduler.config
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (long - short)
    # In the order of diffusers' `calculate_shift`: another order changes the last bits of the grid.
    return length * slope + (low - slope * short)
