"""Which sizes a model can make, and what a size does to its sampling grid: sums that several
families share."""

from __future__ import annotations

from tempflow.errors import UserError
from tempflow.types import Size


def check_multiple(size: Size, multiple: int, frame_step: int | None = None) -> None:
    """UserError for a size that a model cannot make.

    multiple, frame_step: as `Policy.size_multiple` and `Policy.frame_step` return them.
    """
    if size.height % multiple or size.width % multiple:
        raise UserError(
            f"rollout.height, rollout.width: {size}; both must be multiples of {multiple}"
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
    """mu of a scheduler's dynamic shifting for images of `length` tokens; max_shift: where its
    config does not say."""
    config = scheduler.config
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (long - short)
    return length * slope + (low - slope * short)
