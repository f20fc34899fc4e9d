"""Estimate the disk space of a run's checkpoints, and check that they fit.

Only tensors are counted; all else in a checkpoint is about 100 kB. The images and videos of
evaluations are estimated separately, from typical file sizes.

Not counted: logs, the embedding cache, and a temporary copy of twice a checkpoint's size that is
made when a run resumes on another number of ranks.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tempflow.config import Config
from tempflow.errors import UserError, counted
from tempflow.estimate.item import Item
from tempflow.estimate.zero import Zero
from tempflow.run.directory import path_of

# Bytes of a sample's file for each pixel of each frame: a photograph as PNG, and a video with
# little motion as WebP.
PIXEL = {"image": 1.5, "video": 0.1}


@dataclass(frozen=True)
class Disk:
    """Disk space of a run."""

    parts: list[Item]
    """The parts of one checkpoint, of all ranks together."""
    kept: int
    """Number of checkpoints at the end of the run."""
    most: int
    """Number of checkpoints at once during the run, one more while a new one is being written."""
    samples: int = 0
    """Bytes of the images or videos of all evaluations, approximately."""

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint."""
        return sum(item.bytes for item in self.parts)

    @property
    def total(self) -> int:
        """Bytes of all checkpoints at the moment when there are most."""
        return self.most * self.checkpoint


def disk(config: Config, zero: Zero) -> Disk:
    """The disk space of a run whose weights and optimizer state are distributed as in `zero`.

    The number of GPUs does not matter: together the ranks write everything once.
    """
    parts = [
        Item("trained weights, fp32", zero.whole_fp32, "model.lora"),
        Item(
            "average of them, fp32",
            zero.whole_fp32 if config.averaging() else 0,
            "training.ema, training.merge",
        ),
        Item(
            "snapshots of them, fp32",
            zero.whole_fp32 * config.training.merge.last if config.training.merge else 0,
            "training.merge.last",
        ),
        # The rest is written by DeepSpeed, for resuming; the fp32 weights above are the engine's.
        Item("DeepSpeed: weights", zero.saved_weights, "model.lora, zero_optimization.stage, bf16"),
        Item("DeepSpeed: optimizer", zero.saved_optimizer, "model.lora, optimizer"),
    ]
    kept = min(_written(config), config.checkpoint.keep + _keeps_best(config))
    return Disk(
        [item for item in parts if item.bytes],
        kept,
        # The new checkpoint is complete before an older one is deleted.
        min(_written(config), kept + 1),
        _samples(config),
    )


def _samples(config: Config) -> int:
    """Bytes of the samples of all evaluations, of which one is before training."""
    e, size = config.eval, config.rollout.size
    if not config.data.heldout or not e.every:
        return 0
    evaluations = 1 + -(-config.training.iterations // e.every)
    each = size.height * size.width * size.frames * PIXEL["image" if size.frames == 1 else "video"]
    return int(evaluations * min(e.prompts, e.keep_samples) * each)


def _written(config: Config) -> int:
    """Checkpoints that a whole run writes; the last iteration always writes one."""
    every = config.checkpoint.every  # 0: only the last iteration writes one
    return -(-config.training.iterations // every) if every else 1


def _keeps_best(config: Config) -> bool:
    return bool(config.checkpoint.keep_best and config.data.heldout and config.eval.every)


def free_bytes(config: Config) -> int:
    """Free bytes of the run directory's file system.

    Unfinished checkpoints of a run that was killed count as free: saving removes them first.
    """
    run_dir = path_of(config)
    # The run directory may not exist yet; the nearest folder above it is on the same disk.
    there = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    drafts = (
        file for draft in (run_dir / "checkpoints").glob(".saving-*") for file in draft.rglob("*")
    )
    return shutil.disk_usage(there).free + sum(
        file.stat().st_size for file in drafts if file.is_file()
    )


def check_room(config: Config, needed: Disk) -> str | None:
    """Compare the disk space that a run needs with what is free.

    Returns:
        A warning if fewer checkpoints fit than the run may keep; None if all fit.

    Raises:
        UserError: not even one checkpoint fits.
    """
    # A warning only, where some checkpoints fit: the user may free space during the run.
    free = free_bytes(config)
    if free >= needed.total:
        return None
    where = Path(config.logging.dir).absolute()
    parts = ", ".join(f"{item.name} {_size(item.bytes)}" for item in needed.parts)
    if free < needed.checkpoint:
        raise UserError(
            f"logging.dir: {where} has {_size(free)} free, and one checkpoint takes"
            f" {_size(needed.checkpoint)} ({parts}). Free more space, or name another folder"
        )
    return (
        f"warning: logging.dir: {where} has {_size(free)} free; up to"
        f" {counted(needed.most, 'checkpoint')} of {_size(needed.checkpoint)} may be there"
        f" at once, {_size(needed.total)} together. Free more space, or lower checkpoint.keep"
        f" ({config.checkpoint.keep})"
    )


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
