"""Prompts from files and datasets, and the order in which an iteration's prompts are drawn.

The order is a function of (seed, cursor) alone: a resumed run, or one on another number of ranks, sees the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from tempflow.config import HubDataset
from tempflow.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt's text and what its file says besides; metadata["source"] is "file:line", or "dataset[split]:row" from row 0.

    negative: what to guide away from, for families with classifier-free guidance; None: the family's default.
    """

    text: str
    metadata: dict = field(default_factory=dict)
    negative: str | None = None


def load_prompts(given: str | Path | HubDataset, key: str = "data.train") -> list[Prompt]:
    """Read .txt (one prompt a line) or .jsonl (objects with `prompt`, and `negative_prompt` if need be; other keys become
    metadata). Of a folder, the file of the key's split: train or test, .txt, .jsonl or _metadata.jsonl. Or a dataset.

    Blank lines are skipped. Raises UserError naming the config key, the file and the line.
    """
    if isinstance(given, HubDataset):
        return _read_dataset(given, key)
    file = Path(given)
    if file.is_dir():
        file = _file_of_split(file, "train" if key == "data.train" else "test", key)
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{key}: {file} must end in .txt or .jsonl")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # the other line ends of str.splitlines may stand in a prompt
    except FileNotFoundError:
        raise UserError(f"{key}: prompt file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read {file}: {error}") from None
    read = _read_jsonl if file.suffix == ".jsonl" else _read_text
    prompts = [read(line, f"{file}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{key}: {file} holds no prompts")
    return prompts


def _file_of_split(folder: Path, split: str, key: str) -> Path:
    names = [f"{split}.txt", f"{split}.jsonl", f"{split}_metadata.jsonl"]
    found = [name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        raise UserError(f"{key}: folder {folder} holds {' and '.join(found) or 'none'} of {', '.join(names)}; one is expected")
    return folder / found[0]


def _read_text(line: str, source: str) -> Prompt:
    return Prompt(line.strip(), {"source": source})


def _read_jsonl(line: str, source: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UserError(f'{source}: expected an object with a "prompt", got {line.strip()[:80]}')
    return _prompt(entry, source)


def _prompt(entry: dict, source: str, column: str = "prompt") -> Prompt:
    """A prompt of the text in `column`; the other entries are its metadata. UserError naming `source`."""
    keys = ", ".join(entry)
    text, negative = entry.pop(column, None), entry.pop("negative_prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{source}: expected a non-empty text as "{column}", got {text!r:.80} (keys: {keys:.80})')
    if not isinstance(negative, str | None):
        raise UserError(f'{source}: "negative_prompt" must be a text, got {negative!r:.80}')
    return Prompt(text, {**entry, "source": source}, negative)


def _read_dataset(given: HubDataset, key: str) -> list[Prompt]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{key}: a dataset needs the package datasets ({error}): pip install datasets, or name a file") from None
    try:
        table = datasets.load_dataset(given.dataset, given.subset, split=given.split, revision=given.revision)
    except Exception as error:  # of many kinds: no such dataset, subset or split, no network, a damaged file
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{key}: cannot read split {given.split!r} of dataset {given.dataset}: {cause}") from None
    for setting, columns in (("column", [given.column]), ("metadata", given.metadata)):
        if unknown := [name for name in columns if name not in table.column_names]:
            known = ", ".join(table.column_names)
            raise UserError(f"{key}.{setting}: {given.dataset} has no column {', '.join(unknown)}; it has {known}")
    wanted = {given.column, *given.metadata, "negative_prompt"}
    # Columns left out are never decoded, as pictures would be.
    table = table.select_columns([name for name in table.column_names if name in wanted])
    prompts = [_prompt(row, f"{given.dataset}[{given.split}]:{i}", given.column) for i, row in enumerate(table)]
    if not prompts:
        raise UserError(f"{key}: split {given.split!r} of dataset {given.dataset} holds no prompts")
    return prompts


class PromptOrder:
    """Draws `per_iteration` different prompts for each iteration, every prompt once per epoch.

    An epoch is cut to a whole number of iterations, so no iteration holds a prompt twice.
    """

    def __init__(self, count: int, per_iteration: int, seed: int):
        if per_iteration > count:
            raise UserError(f"data.prompts_per_iteration: {per_iteration}, but data.train holds {count} prompts")
        self.count, self.per_iteration, self._seed = count, per_iteration, seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def indices(self, iteration: int) -> list[int]:
        """Prompt indices of an iteration, counted from 0."""
        per_epoch = self.count // self.per_iteration
        epoch, place = divmod(iteration, per_epoch)
        return self._epoch(epoch)[place * self.per_iteration : (place + 1) * self.per_iteration].tolist()

    def at(self, cursor: int) -> int:
        """The prompt index at a place of the endless order, whole epochs one after another."""
        epoch, place = divmod(cursor, self.count)
        return int(self._epoch(epoch)[place])

    def reached(self, iterations: int) -> list[int]:
        """Indices of the prompts that the first `iterations` iterations may draw, in rising order: after an epoch, all."""
        if iterations >= self.count // self.per_iteration:
            return list(range(self.count))
        return sorted(i for iteration in range(iterations) for i in self.indices(iteration))

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self.count)
