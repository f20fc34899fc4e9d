"""Run directories: claiming a new one, continuing an old one, and reading the config of one.

A run directory is claimed once. A later start needs --resume and the same config, apart from the
keys that do not change what the run computes. config.json is written with absolute paths, so that
commands can read the run from any folder.
"""

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

# Sections and keys that may change between a run and its continuation. All others decide what the
# run computes: with another learning rate, config.json would no longer describe its own run.
FREE_ON_RESUME = ("logging", "checkpoint", "reward_pool")
FREE_KEYS = (
    ("training", "iterations"),  # a run may be made longer
    ("training", "minutes"),
    ("eval", "stop"),
    ("eval", "precision_recall"),
    ("data", "embedding_cache"),
    ("rollout", "graphs"),
    ("rollout", "graph_limit_mb"),
    ("rollout", "graph_verify"),
)

# What a start leaves behind that fails before its first iteration has ended. A directory with
# nothing else in it is claimed again without --resume: there is no training in it to lose.
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
    """The run directory that a config names; it need not exist."""
    return Path(config.logging.dir, str(config.logging.name))


def check_place(config: Config) -> None:
    """Refuse a run directory that cannot be made, without making it.

    A network file system may still refuse what this check allows; `held` reports that.

    Raises:
        UserError: where a file is in the way or the folder cannot be written.
    """
    run_dir = path_of(config)
    with _refusals(run_dir):
        # lexists: a link to nowhere is in the way as well, and `exists` would not see it.
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
    """Claim the run directory on all ranks; rank 0 holds its lock while the block runs.

    Args:
        config: its logging.dir and logging.name name the directory.
        resume: whether to continue the run that is there.
        check: called on rank 0 before anything is written; raises UserError, or returns a warning
            about the machine.

    Yields:
        The run directory, and the checkpoint to resume from, None where there is none.

    Raises:
        UserError: on every rank alike.
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

        # Collective: an error of rank 0 is raised on all ranks. Raised on rank 0 alone, it would
        # leave the others waiting in their next collective.
        found = distributed.on_first_rank(claim)
        run_dir = path_of(config)
        # Checkpoints are written by every rank, so each of them has to see the same folder.
        if distributed.reduce(not run_dir.is_dir(), "max"):
            raise UserError(
                f"logging.dir: {run_dir} is not the same folder for all ranks; it must be on a file"
                " system they share"
            )
        yield run_dir, distributed.agree_on(found)


@contextmanager
def held(config: Config, resume: bool) -> Iterator[Path]:
    """Claim the run directory, and lock it against other processes while the block runs. Called on
    rank 0.

    Raises:
        UserError: as `claim`, where another process holds the lock, or where the directory cannot
            be written.
    """
    check_place(config)
    run_dir = path_of(config)
    # Before the lock is taken, which writes a file: a folder that is not a run directory stays as
    # it is. With a lock in it, the holder is asked first: its refusal is the better message.
    if resume or not (run_dir / LOCK).exists():
        _check_begun(run_dir, resume)
    with ExitStack() as stack:
        with _refusals(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(run_dir))
        yield claim(config, resume)


def claim(config: Config, resume: bool) -> Path:
    """Make the run directory and write its config.json.

    Raises:
        UserError: where the directory exists and `resume` is False, or where `resume` is True and
            the config differs from that of the run.
    """
    run_dir = path_of(config)
    _check_begun(run_dir, resume)
    table, started_in = config.model_dump(mode="json"), [os.getcwd()]
    places.absolute(table)
    if resume:
        old, folders = _read_table(run_dir)
        # All folders are kept: a run's own rewards may lie where it was first started.
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
    """Whether the directory holds nothing but what failed starts leave; see BEFORE_TRAINING."""
    if not run_dir.is_dir():
        return False
    try:
        names = [
            p.name
            for p in run_dir.iterdir()
            if not (p.name.startswith(".") and p.name.endswith(".tmp"))  # drafts of write_atomic
        ]
        sets = [p.name for p in (run_dir / "samples").iterdir()] if "samples" in names else []
        if not set(names) <= set(BEFORE_TRAINING) or not set(sets) <= {"000000", ".000000"}:
            return False
        return all(row.get("iteration") == 0 for row in read_metrics(run_dir))
    except (UserError, OSError):  # it cannot be read: then it may hold anything
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
    # Both parsed: the old file may lack keys that were added since, which then have their defaults.
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
    """The name and both values of what differs: for two components of one type the first option
    that does, else the whole value."""
    if name in registry.IN_CONFIG and was and now and was["type"] == now["type"]:
        option = next(key for key in {**was, **now} if was.get(key) != now.get(key))
        return f"{name}.{option}", was.get(option), now.get(option)
    return name, was, now


def _read_table(run_dir: Path) -> tuple[dict, list[str]]:
    """The settings of config.json with paths that exist now, and the folders of the run's own
    modules. UserError where there is no config.json."""
    try:
        table = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("config.json holds no table")
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir} is no run directory: {error}") from None
    # Before `relocate`, which changes logging.dir: the folders are found from where the run began.
    folders = places.module_folders(table, run_dir)
    places.relocate(table, run_dir)
    translate(table)
    return {key: value for key, value in table.items() if key != places.STARTED_IN}, folders


def read_config(run_dir: Path) -> Config:
    """The resolved config of a run.

    Raises:
        UserError: where the folder holds no run.
    """
    find_modules(run_dir)
    return parse_config(_read_table(run_dir)[0])


def find_modules(run_dir: Path) -> None:
    """Add the folders in which the run was started to sys.path, so that its own components and
    rewards can be imported from any working directory."""
    if (run_dir / "config.json").exists():
        # At the end: a file there must not hide a library.
        sys.path.extend(folder for folder in _read_table(run_dir)[1] if folder not in sys.path)
