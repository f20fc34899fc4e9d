"""Disk that a run's checkpoints take: what one holds, how many there are at once, and whether they
fit where they are written.

Counted are the tensors, which are all but some 100 kB of a checkpoint. What the samples of a run
take is told apart, by a rule of thumb.
Left out: its logs, the embedding cache, and the copy, twice a checkpoint's size, that a resume on
another number of ranks makes for a while.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tempflow.config import Config
from tempflow.errors import UserError
from tempflow.estimate.item import Item
from tempflow.estimate.zero import Zero
from tempflow.run.directory import path_of

# bytes of a sample's file for each pixel of each frame: PNG of a photo, WebP of a calm video
PIXEL = {"image": 1.5, "video": 0.1}


@dataclass(frozen=True)
class Disk:
    """parts: of one checkpoint, of all ranks together. kept: checkpoints that stay at the end of a
    run; most: at once on the way, with the one that is being written before an older one leaves.
    samples: of all evaluations, about."""

    parts: list[Item]
    kept: int
    most: int
    samples: int = 0

    @property
    def checkpoint(self) -> int:
        """Bytes of one."""
        return sum(item.bytes for item in self.parts)

    @property
    def total(self) -> int:
        """Bytes of the most at once."""
        return self.most * self.checkpoint


def disk(config: Config, zero: Zero) -> Disk:
    """Of a run whose weights, gradients and optimizer state are spread as `zero` says; the number
    of GPUs does not matter."""
    parts = [
        Item("trained weights, fp32", zero.whole_fp32, "model.lora"),
        Item(
            "average of them, fp32",
            zero.whole_fp32 if config.averaging() else 0,
            "training.ema, training.merge",
        ),
        Item(
            "snapshots of them, fp32",
            zero.whole_fp32 * config.averaged_copies() if config.training.merge else 0,
            "training.merge.last",
        ),
        Item("DeepSpeed: weights", zero.saved_weights, "model.lora, zero_optimization.stage, bf16"),
        Item("DeepSpeed: optimizer", zero.saved_optimizer, "model.lora, optimizer"),
    ]
    kept = min(_written(config), config.checkpoint.keep + _keeps_best(config))
    return Disk(
        [item for item in parts if item.bytes],
        kept,
        min(_written(config), kept + 1),
        _samples(config),
    )


def _samples(config: Config) -> int:
    """Of the evaluation before training, those on the way and the last one."""
    e, size = config.eval, config.rollout.size
    if not config.data.heldout or not e.every:
        return 0
    evaluations = 1 + -(-config.training.iterations // e.every)
    each = size.height * size.width * size.frames * PIXEL["image" if size.frames == 1 else "video"]
    return int(evaluations * min(e.prompts, e.keep_samples) * each)


def _written(config: Config) -> int:
    """Checkpoints in a whole run: the last iteration always leaves one."""
    every = config.checkpoint.every
    return -(-config.training.iterations // every) if every else 1


def _keeps_best(config: Config) -> bool:
    return bool(config.checkpoint.keep_best and config.data.heldout and config.eval.every)


def free_bytes(config: Config) -> int:
    """What the file system of the run directory has left, drafts of checkpoints counted in that the
    next one removes."""
    run_dir = path_of(config)
    there = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    drafts = (
        file for draft in (run_dir / "checkpoints").glob(".saving-*") for file in draft.rglob("*")
    )
    return shutil.disk_usage(there).free + sum(
        file.stat().st_size for file in drafts if file.is_file()
    )


def check_room(config: Config, needed: Disk) -> str | None:
    """UserError where not even one checkpoint fits; a warning where fewer fit than the run may
    keep; else None."""
    free = free_bytes(config)
    if free >= needed.total:
        return None
    where = Path(config.logging.dir).absolute()
    parts = ", ".join(f"{item.name} {_size(item.bytes)}" for item in needed.parts)
    if free < needed.checkpoint:
        raise UserError(
            f"logging.dir: {where} has {_size(free)} free, and one checkpoint takes"
            f" {_size(needed.checkpoint)} ({parts}). Free more, or name another folder"
        )
    return (
        f"warning: logging.dir: {where} has {_size(free)} free; up to {needed.most} checkpoints of"
        f" {_size(needed.checkpoint)} may lie there at once, {_size(needed.total)} together. Free"
        f" more, or lower checkpoint.keep ({config.checkpoint.keep})"
    )


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
