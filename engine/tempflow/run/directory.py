"""Run directories: claiming a new one, taking an old one up again, and finding what a script should
read from it."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Callable, Iterator

from tempflow import registry
from tempflow.config import Config, parse_config
from tempflow.config.moved import translate
from tempflow.errors import UserError, shown
from tempflow.run import places
from tempflow.run.lock import LOCK, lock
from tempflow.run.logs import METRICS_FILE, read_metrics, write_atomic

# Keys that may change between a run and its continuation; the rest decides what the run computes.
FREE_ON_RESUME = ("logging", "checkpoint", "reward_pool")
FREE_KEYS = (
    ("training", "iterations"),
    ("training", "minutes"),
    ("eval", "stop"),
    ("eval", "precision_recall"),
    ("data", "embedding_cache"),
    ("rollout", "graphs"),
    ("rollout", "graph_limit_mb"),
    ("rollout", "graph_verify"),
)

# What a start leaves that fails before its first iteration has ended: nothing is lost by starting
# over.
BEFORE_TRAINING = (
    "config.json",
    LOCK,
    METRICS_FILE,
    "report.html",
    "samples",
    "tensorboard",
    "wandb",
    "wandb_id.txt",
)


def path_of(config: Config) -> Path:
    return Path(config.logging.dir, str(config.logging.name))


def check_place(config: Config) -> None:
    """UserError where the run directory cannot be made; what only trying shows, `held` finds."""
    run_dir = path_of(config)
    with _refusals(run_dir):
        found = next(
            place
            for place in (run_dir.absolute(), *run_dir.absolute().parents)
            if os.path.lexists(place)
        )
        if not found.is_dir():
            raise UserError(
                f"logging.dir, logging.name: {run_dir} cannot be a run directory: {found} exists"
                " and is not a folder"
            )
        if not os.access(found, os.W_OK | os.X_OK):
            raise UserError(
                f"logging.dir, logging.name: {run_dir} cannot be a run directory: {found} cannot be"
                " written"
            )


@contextmanager
def claim_run(
    config: Config, resume: bool, check: Callable[[], str | None] = lambda: None
) -> Iterator[tuple[Path, Path | None]]:
    """The run directory, held by rank 0 for all while the block runs, and the checkpoint to resume
    from, if any.

    check: what rank 0 finds wrong with the machine, before anything is written: raises UserError,
    or returns a warning. Raises UserError on every rank alike.
    """
    from tempflow.checkpoints import find
    from tempflow.training import distributed  # loads torch, which the checks before do without

    distributed.init_distributed()
    with ExitStack() as stack:

        def claim() -> Path | None:
            if warning := check():
                print(warning, flush=True)
            run_dir = stack.enter_context(held(config, resume))
            return (
                find.newest(run_dir, note=lambda text: print(text, flush=True)) if resume else None
            )

        found = distributed.on_first_rank(claim)
        run_dir = path_of(config)
        if distributed.reduce(not run_dir.is_dir(), "max"):
            raise UserError(
                f"logging.dir: {run_dir} is not the same folder for all ranks; it must be on a file"
                " system they share"
            )
        yield run_dir, distributed.agree_on(found)


@contextmanager
def held(config: Config, resume: bool) -> Iterator[Path]:
    """The run directory, claimed, and locked against other processes while the block runs. Call on
    rank 0.

    Raises UserError as `claim` does, and where another process holds it or it cannot be written.
    """
    check_place(config)
    run_dir = path_of(config)
    # a folder that may be none of ours is not written into
    if resume or not (run_dir / LOCK).exists():
        _check_begun(run_dir, resume)
    with ExitStack() as stack:
        with _refusals(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(run_dir))
        yield claim(config, resume)


def claim(config: Config, resume: bool) -> Path:
    """The run directory, with config.json written.

    Raises UserError where it exists without `resume`, or where `resume` meets another config.
    """
    run_dir = path_of(config)
    _check_begun(run_dir, resume)
    table, started_in = config.model_dump(mode="json"), [os.getcwd()]
    places.absolute(table)
    if resume:
        old, folders = _read_table(run_dir)
        started_in += [folder for folder in folders if folder not in started_in]
        _check_same(old, table, run_dir)
    with _refusals(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(
            run_dir / "config.json", json.dumps({places.STARTED_IN: started_in, **table}, indent=1)
        )
    return run_dir


def _check_begun(run_dir: Path, resume: bool) -> None:
    if resume and not (run_dir / "config.json").exists():
        raise UserError(f"--resume: {run_dir} holds no run (no config.json)")
    if not resume and os.path.lexists(run_dir) and not _never_began(run_dir):
        raise UserError(
            f"run directory {run_dir} exists; continue it with --resume, or choose another with"
            " --set logging.name=NAME"
        )


def _never_began(run_dir: Path) -> bool:
    """Whether it holds nothing but what starts leave that did not finish an iteration."""
    if not run_dir.is_dir():
        return False
    try:
        names = [
            p.name
            for p in run_dir.iterdir()
            if not (p.name.startswith(".") and p.name.endswith(".tmp"))
        ]
        sets = [p.name for p in (run_dir / "samples").iterdir()] if "samples" in names else []
        if not set(names) <= set(BEFORE_TRAINING) or not set(sets) <= {"000000", ".000000"}:
            return False
        return all(row.get("iteration") == 0 for row in read_metrics(run_dir))
    except (UserError, OSError):
        return False


@contextmanager
def _refusals(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"logging.dir, logging.name: {run_dir} cannot be written: {reason}"
        ) from None


def _check_same(old: dict, new: dict, run_dir: Path) -> None:
    a, b = parse_config(old).model_dump(), parse_config(new).model_dump()
    places.resolved(a)
    places.resolved(b)
    for section in (name for name in a if name not in FREE_ON_RESUME):
        for key in {**a[section], **b[section]}:
            was, now = a[section].get(key), b[section].get(key)
            if was != now and (section, key) not in FREE_KEYS:
                name, was, now = _first_difference(f"{section}.{key}", was, now)
                raise UserError(
                    f"--resume: {name} is {shown(now)}, but the run in {run_dir} has {shown(was)}"
                )


def _first_difference(name: str, was, now) -> tuple[str, object, object]:
    """Of components of one type, the first option that differs; of anything else, the whole."""
    if name in registry.IN_CONFIG and was and now and was["type"] == now["type"]:
        option = next(key for key in {**was, **now} if was.get(key) != now.get(key))
        return f"{name}.{option}", was.get(option), now.get(option)
    return name, was, now


def _read_table(run_dir: Path) -> tuple[dict, list[str]]:
    """The settings of config.json, with the paths as they are now, and the folders of the run's own
    modules. UserError without one."""
    try:
        table = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("config.json holds no table")
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir} is no run directory: {error}") from None
    folders = places.module_folders(table, run_dir)
    places.relocate(table, run_dir)
    translate(table)
    return {key: value for key, value in table.items() if key != places.STARTED_IN}, folders


def read_config(run_dir: Path) -> Config:
    """The resolved config of a run. UserError where there is none."""
    find_modules(run_dir)
    return parse_config(_read_table(run_dir)[0])


def find_modules(run_dir: Path) -> None:
    """Let modules of the run's own components and rewards be imported from where the run was
    started, wherever this process was."""
    if (run_dir / "config.json").exists():
        sys.path.extend(folder for folder in _read_table(run_dir)[1] if folder not in sys.path)
