"""The paths in a config: made absolute when a run begins, and found again after the run or its
files were moved.

config.json holds absolute paths, the run directory's own among them. So each path is also known
relative to the run directory, which finds the file again after a clone was moved or copied together
with its runs. All functions take a config as nested tables, any part of which may be missing or
wrong: they run before the config is checked.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Callable

from tempflow.errors import VALUE, UserError, shortened

# Key in config.json: the working directories in which the run was started and resumed. Modules with
# its own components and rewards are imported from there.
STARTED_IN = "$started_in"
# The run makes these where they do not exist. Of the other paths, one that does not exist may be a
# model or data set id of the hub, and stays as it is.
_MADE = ("data.embedding_cache", "logging.dir")
_PATHS = (
    "model.path",
    "model.lora.start",
    "data.train",
    "data.train.dataset",
    "data.heldout",
    "data.heldout.dataset",
    *_MADE,
)
# Options of rewards that hold paths, as far as this project knows them.
_REWARD_OPTIONS = ("path", "base", "head", "tokenizer", "rubric_file")


def expanded(table: dict) -> None:
    """Replace a leading ~ by the home folder, in place. UserError where no home is known."""
    _change(table, _expand)


def absolute(table: dict) -> None:
    """Make the paths that exist, or that the run makes, absolute, in place."""
    _change(
        table,
        lambda key, value: (
            os.path.abspath(value) if key in _MADE or os.path.exists(value) else value
        ),
    )


def resolved(table: dict) -> None:
    """Resolve links in the paths that exist, in place, so that equal texts mean the same file."""
    _change(table, lambda key, value: os.path.realpath(value) if os.path.exists(value) else value)


def relocate(table: dict, run_dir: Path) -> None:
    """Change the paths of a run's config.json, in place, to where the files are now.

    Runs of older versions hold relative paths; these are looked up from the working directory and
    from the folders above the run. If the run was moved, each path is first looked up relative to
    the run directory, then as it is.
    """
    began = _began_in(table)
    # With and without links: relative to a linked runs/ folder, ".." leads to another place.
    here = list(dict.fromkeys([os.path.abspath(run_dir), os.path.realpath(run_dir)]))
    moved = began is not None and os.path.realpath(began) != here[-1]
    _change(table, partial(_find, began if moved else None, here))
    if (began is None or moved) and isinstance(table.get("logging"), dict):
        table["logging"] |= {"dir": os.path.dirname(here[0]), "name": os.path.basename(here[0])}


def module_folders(table: dict, run_dir: Path) -> list[str]:
    """Existing folders in which modules of the run's rewards may lie: where the run was started,
    first relative to the run directory, then as recorded."""
    began, found = _began_in(table), []
    for folder in table.get(STARTED_IN, []):
        if began is not None:
            found.append(_followed(folder, began, os.path.abspath(run_dir)))
        found.append(folder)
    return [folder for folder in dict.fromkeys(found) if os.path.isdir(folder)]


def _began_in(table: dict) -> str | None:
    """The run directory at the time config.json was written; None for relative paths."""
    logging: Any = table.get("logging")
    known = (
        isinstance(logging, dict)
        and isinstance(logging.get("name"), str)
        and os.path.isabs(str(logging.get("dir", "")))
    )
    return os.path.join(logging["dir"], logging["name"]) if known else None


def _find(began: str | None, here: list[str], key: str, value: str) -> str:
    if not os.path.isabs(value):
        candidates = [
            os.path.join(folder, value)
            for folder in (os.getcwd(), *map(str, Path(here[0]).parents))
        ]
    else:
        candidates = [] if began is None else [_followed(value, began, place) for place in here]
        candidates.append(value)
    # What the run makes is made beside the moved run, not in the folder of the original.
    missing = candidates[0] if key in _MADE and began is not None else value
    return next(filter(os.path.exists, candidates), missing)


def _followed(path: str, began: str, here: str) -> str:
    """The path that is to `here` what `path` was to the run directory `began`."""
    return os.path.normpath(os.path.join(here, os.path.relpath(path, began)))


def at_home(path: str) -> str:
    """A path with a leading ~ replaced by the home folder. ValueError where no home is known."""
    found = os.path.expanduser(path)  # unchanged where it knows no home
    if found.startswith("~") and not os.path.exists(found):
        given = shortened(path, VALUE)
        raise ValueError(
            f"{given} begins with ~, and no such home folder is known here; set HOME, or write the"
            " path in full"
        )
    return found


def _expand(key: str, value: str) -> str:
    try:
        return at_home(value)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def _change(table: dict, change: Callable[[str, str], str]) -> None:
    """Replace every path in the tables by change(key, value)."""
    rewards = table.get("rewards")
    options = [
        ("rewards", name, key)
        for name in (rewards if isinstance(rewards, dict) else ())
        for key in _REWARD_OPTIONS
    ]
    for *sections, key in (*(path.split(".") for path in _PATHS), *options):
        inner: Any = table
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get(key), str):
            inner[key] = change(".".join([*sections, key]), inner[key])
