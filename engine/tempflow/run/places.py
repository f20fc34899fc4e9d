"""Where the files lie that a config names: made absolute when a run begins, found again when the
run or its files were moved.

config.json holds absolute paths. The run directory's own place is among them, so a path can also be
followed from the run directory: that finds it after a clone was moved or copied together with its
runs. All functions take a config as nested tables, of which any part may be missing.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Callable

from tempflow.errors import VALUE, UserError, shortened

# in config.json: folders of the commands that started or resumed the run, where its modules lie
STARTED_IN = "$started_in"
# made by the run where they do not exist; of the others some are hub ids
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
_REWARD_OPTIONS = ("path", "base", "head", "tokenizer", "rubric_file")


def expanded(table: dict) -> None:
    """Put the home folder for a leading ~, in place. UserError where there is none."""
    _change(table, _expand)


def absolute(table: dict) -> None:
    """Make paths that exist, or that the run makes, absolute, in place."""
    _change(
        table,
        lambda key, value: (
            os.path.abspath(value) if key in _MADE or os.path.exists(value) else value
        ),
    )


def resolved(table: dict) -> None:
    """Follow links in the paths that exist, in place: equal texts then mean the same file."""
    _change(table, lambda key, value: os.path.realpath(value) if os.path.exists(value) else value)


def relocate(table: dict, run_dir: Path) -> None:
    """Change the paths of a run's config.json, in place, to where the files are now.

    A relative path, as runs of older versions have it, is looked up from the working directory and
    from the folders above the run. Of a run that was moved, each path is followed from the run
    directory first.
    """
    began = _began_in(table)
    here = list(dict.fromkeys([os.path.abspath(run_dir), os.path.realpath(run_dir)]))
    moved = began is not None and os.path.realpath(began) != here[-1]
    _change(table, partial(_find, began if moved else None, here))
    if (began is None or moved) and isinstance(table.get("logging"), dict):
        table["logging"] |= {"dir": os.path.dirname(here[0]), "name": os.path.basename(here[0])}


def module_folders(table: dict, run_dir: Path) -> list[str]:
    """Folders in which modules of the run's rewards may lie: where it was started, as seen from the
    run directory and as it was."""
    began, found = _began_in(table), []
    for folder in table.get(STARTED_IN, []):
        if began is not None:
            found.append(_followed(folder, began, os.path.abspath(run_dir)))
        found.append(folder)
    return [folder for folder in dict.fromkeys(found) if os.path.isdir(folder)]


def _began_in(table: dict) -> str | None:
    """The run directory when config.json was written; None in a config with relative paths."""
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
    missing = candidates[0] if key in _MADE and began is not None else value
    return next(filter(os.path.exists, candidates), missing)


def _followed(path: str, began: str, here: str) -> str:
    """`path` as it lay from the run directory `began`, from where that is now."""
    return os.path.normpath(os.path.join(here, os.path.relpath(path, began)))


def at_home(path: str) -> str:
    """A path with the home folder for a leading ~. ValueError where there is none."""
    found = os.path.expanduser(path)
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
    """Put change(key, value) for every path that the tables name."""
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
