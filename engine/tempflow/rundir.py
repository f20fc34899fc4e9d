"""Run directories: claiming a new one, taking an old one up again, and finding what a script should read from it."""

from __future__ import annotations

import json
from pathlib import Path

from tempflow.config import Config, parse_config
from tempflow.errors import UserError, shown
from tempflow.logs import write_atomic

# Keys that may change between a run and its continuation; the rest decides what the run computes.
FREE_ON_RESUME = ("logging", "checkpoint", "reward_pool")
FREE_KEYS = (("training", "iterations"), ("training", "minutes"), ("eval", "stop"), ("data", "embedding_cache"))


def path_of(config: Config) -> Path:
    return Path(config.logging.dir) / config.logging.name


def claim(config: Config, resume: bool) -> Path:
    """The run directory, with config.json written. Call on rank 0.

    Raises UserError where it exists without `resume`, or where `resume` meets another config.
    """
    run_dir = path_of(config)
    written = run_dir / "config.json"
    if run_dir.exists() and not resume and not _never_began(run_dir):
        raise UserError(
            f"run directory {run_dir} exists; continue it with --resume, or choose another with --set logging.name=NAME"
        )
    if resume and not written.exists():
        raise UserError(f"--resume: {run_dir} holds no run (no config.json)")
    if resume:
        _check_same(read_config(run_dir), config, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(written, config.model_dump_json(indent=1))
    return run_dir


def _never_began(run_dir: Path) -> bool:
    """A start that failed while the model was loading left at most config.json; nothing is lost by starting over."""
    return run_dir.is_dir() and all(p.name == "config.json" for p in run_dir.iterdir())


def _check_same(old: Config, new: Config, run_dir: Path) -> None:
    a, b = old.model_dump(), new.model_dump()
    for section in (name for name in a if name not in FREE_ON_RESUME):
        for key in {**a[section], **b[section]}:
            was, now = a[section].get(key), b[section].get(key)
            if was != now and (section, key) not in FREE_KEYS:
                raise UserError(f"--resume: {section}.{key} is {shown(now)}, but the run in {run_dir} has {shown(was)}")


def read_config(run_dir: Path) -> Config:
    """The resolved config of a run. UserError where there is none."""
    try:
        return parse_config(json.loads((run_dir / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir} is no run directory: {error}") from None
