"""Prompts from files and datasets, and the order in which iterations draw them.

The order is a function of (seed, cursor) alone, so a resumed run and a run on another number of
ranks draw the same prompts. Everything unusual in a file is refused with its line, because a prompt
that was read wrongly would be trained on without anybody noticing.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from tempflow.config import HubDataset, strict_json
from tempflow.data.images import MOST_HELD, READERS, arrays_of, typed_images, with_images
from tempflow.errors import VALUE, UserError, brief, note, shortened, shown
from tempflow.types import Example

# Characters of a prompt: far beyond the 1024 tokens that the longest text encoder takes.
LONGEST = 32768

# A line that a spreadsheet exported as one quoted cell, with inner quotation marks doubled.
_CELL = re.compile(r'"(?:[^"]|"")*"')
# Invisible characters that no prompt means: control characters except tab and line ends.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def load_prompts(given: str | Path | HubDataset, key: str = "data.train") -> list[Example]:
    """Read the prompts of a file, a folder or a dataset.

    A .txt file has one prompt a line. A .jsonl file has one object a line, with `prompt` and
    optionally `negative_prompt` and `image` or `images`; its other keys become metadata. In a
    folder, the file of the key's split is read: train or test, with the ending .txt, .jsonl or
    _metadata.jsonl. Blank lines are skipped. Two changes are made, each with a note to the user:
    a spreadsheet's quoting is removed, and prompts longer than `LONGEST` characters are cut.

    Args:
        given: a file, a folder or a dataset.
        key: the config key it comes from, for messages and for the split.

    Returns:
        At least one prompt.

    Raises:
        UserError: names the config key, the file and the line.
    """
    prompts = (
        _read_dataset(given, key) if isinstance(given, HubDataset) else _read_file(Path(given), key)
    )
    long = [
        i
        for i, prompt in enumerate(prompts)
        if max(len(prompt.text), len(prompt.negative or "")) > LONGEST
    ]
    if long:
        note(
            f"{key}: prompts cut to {LONGEST} characters: {len(long)}, the first at"
            f" {prompts[long[0]].metadata['source']}"
        )
    for i in long:
        text, negative = prompts[i].text, prompts[i].negative
        prompts[i] = replace(
            prompts[i], text=text[:LONGEST], negative=negative and negative[:LONGEST]
        )
    return prompts


def digests(train: list[Example], heldout: list[Example]) -> dict[str, str]:
    """A SHA-256 digest of the prompts for each config key, which a checkpoint keeps so that a
    resumed run can tell whether its prompts have changed. It covers texts, negative prompts and
    condition images; metadata is left out."""
    given = {"data.train": train, "data.heldout": heldout}
    # Threads, because hashing waits for the disk and hashlib releases the interpreter's lock.
    with ThreadPoolExecutor(READERS) as readers:
        list(  # `image_digests` are cached properties; this fills them
            readers.map(
                lambda prompt: prompt.image_digests, (p for p in (*train, *heldout) if p.images)
            )
        )
    known = {
        key: json.dumps([[p.text, p.negative, *p.image_digests] for p in prompts])
        for key, prompts in given.items()
    }
    return {key: hashlib.sha256(text.encode()).hexdigest() for key, text in known.items()}


def check_unchanged(saved: dict[str, str], now: dict[str, str]) -> None:
    """UserError if a resumed run has other prompts than its checkpoint. Both arguments are
    `digests`; a key that the checkpoint lacks is not compared."""
    for key, digest in now.items():
        if saved.get(key, digest) != digest:
            raise UserError(
                f"--resume: {key} holds other prompts than when the run was saved, so the run could"
                " neither continue its order of prompts nor measure its gain; restore the file, or"
                " start another run with --set logging.name=NAME"
            )


def typed_prompts(
    texts: list[str], option: str, images: list | None = None, images_option: str = "--image"
) -> list[Example]:
    """Prompts of a command line, with the checks that files undergo.

    Args:
        texts: the prompts.
        option: the option they come from, for messages.
        images: condition images: one entry for all prompts, or an entry for each. An entry is a
            list of what `typed_images` takes.
        images_option: the option that the images come from.

    Raises:
        UserError: for a text or an image that a file could not hold either, or if the numbers of
            images and prompts differ.
    """
    # Without metadata: the "source" of such a prompt would be the option's name.
    prompts = [replace(_prompt({"prompt": text[:LONGEST]}, option), metadata={}) for text in texts]
    if not images:
        return prompts
    if len(images) not in (1, len(texts)):
        raise UserError(
            f"{images_option}: given {len(images)} times for {len(texts)} prompts; give it once for"
            " all prompts, or once for each"
        )
    found = [typed_images(given, images_option) for given in images]
    return [
        replace(prompt, images=entry)
        for prompt, entry in zip(prompts, found * (len(texts) // len(found)), strict=True)
    ]


def _read_file(file: Path, key: str) -> list[Example]:
    if file.is_dir():
        file = _file_of_split(file, "train" if key == "data.train" else "test", key)
    kind = file.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise UserError(f"{key}: {file} must end in .txt or .jsonl")
    # Not splitlines(): it also splits at U+2028 and the like, which may occur inside a prompt.
    lines = _text_of(file, key).split("\n")
    read = _read_jsonl if kind == ".jsonl" else _read_text
    prompts = [read(line, f"{file}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{key}: {file} holds no prompts; write one on each line")
    if kind == ".jsonl":
        prompts = with_images(prompts, file.parent)
    cells = (
        [] if kind == ".jsonl" else [i for i, line in enumerate(lines, 1) if _is_cell(line.strip())]
    )
    if cells:
        note(
            f"{key}: prompts read without the quoting of a spreadsheet: {len(cells)}, the first at"
            f" {file}:{cells[0]}"
        )
    return prompts


def _text_of(file: Path, key: str) -> str:
    try:
        # Byte order marks are removed everywhere: files that were joined have them in the middle.
        text = file.read_text(encoding="utf-8").replace("\ufeff", "")
    except FileNotFoundError:
        raise UserError(f"{key}: prompt file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read {file}: {error}") from None
    # UTF-16 text without a mark decodes as UTF-8 with a zero byte beside every letter.
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise UserError(
            f"{key}: {file}:{line} is not UTF-8 text: it holds zero bytes, as UTF-16 does; save the"
            " file as UTF-8"
        )
    return text


def _file_of_split(folder: Path, split: str, key: str) -> Path:
    names = [f"{split}.txt", f"{split}.jsonl", f"{split}_metadata.jsonl"]
    found = sorted(
        file.name for file in folder.iterdir() if file.name.lower() in names and file.is_file()
    )
    if len(found) != 1:
        raise UserError(
            f"{key}: folder {folder} holds {' and '.join(found) or 'none'} of {', '.join(names)};"
            " it must hold exactly one of them"
        )
    return folder / found[0]


def _is_cell(line: str) -> bool:
    """Whether a line is quoted as spreadsheets export it: as a whole, with doubled quotation marks
    inside. Without any inside, the quotation marks may be the prompt's own."""
    return _CELL.fullmatch(line) is not None and '""' in line[1:-1]


def _read_text(line: str, source: str) -> Example:
    text = line.strip()
    return _prompt({"prompt": text[1:-1].replace('""', '"') if _is_cell(text) else text}, source)


def _read_jsonl(line: str, source: str) -> Example:
    try:
        entry = strict_json.loads(line)
    except strict_json.Refused as error:
        raise UserError(f"{source}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UserError(
            f'{source}: expected an object with a "prompt", got {shortened(line.strip(), VALUE)}'
        )
    return _prompt(entry, source)


def _prompt(entry: dict, source: str, column: str = "prompt") -> Example:
    """A prompt from the text in `column`; the other entries become its metadata. UserError naming
    `source`."""
    keys = shortened(", ".join(entry), VALUE)  # before `pop`: the message shows all of them
    text, negative = entry.pop(column, None), entry.pop("negative_prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f'{source}: expected a non-empty text as "{column}", got {shown(text)} (keys: {keys})'
        )
    if not isinstance(negative, str | None):
        raise UserError(f'{source}: "negative_prompt" must be a text, got {shown(negative)}')
    for name, given in ((column, text), ("negative_prompt", negative or "")):
        _check_characters(given, name, source)
    return Example(text, negative, metadata={**entry, "source": source})


def _check_characters(text: str, name: str, source: str) -> None:
    try:
        strict_json.check_text(text, name)
    except strict_json.Refused as error:
        raise UserError(f"{source}: {error}") from None
    if found := _UNFIT.search(text):
        raise UserError(
            f"{source}: {name} holds the control character U+{ord(found[0]):04X}, which is not"
            " allowed in prompts; is the file UTF-8 text?"
        )


def _read_dataset(given: HubDataset, key: str) -> list[Example]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{key}: a dataset needs the package datasets ({error}): pip install datasets, or name"
            " a file"
        ) from None
    try:
        table = datasets.load_dataset(
            given.dataset, given.subset, split=given.split, revision=given.revision
        )
    # No such dataset, subset or split, no network, a damaged file: each has its own exception type.
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{key}: cannot read split {given.split!r} of dataset {given.dataset}: {cause}"
        ) from None
    for setting, columns in (
        ("column", [given.column]),
        ("metadata", given.metadata),
        ("images", given.images),
    ):
        if unknown := [name for name in columns if name not in table.column_names]:
            known = ", ".join(table.column_names)
            raise UserError(
                f"{key}.{setting}: {given.dataset} has no column {', '.join(unknown)}; it has"
                f" {known}"
            )
    wanted = {given.column, *given.metadata, *given.images, "negative_prompt"}
    # Iterating over the table decodes all of its columns; other columns may hold images.
    table = table.select_columns([name for name in table.column_names if name in wanted])
    prompts = _rows(table, given, key)
    if not prompts:
        raise UserError(f"{key}: split {given.split!r} of dataset {given.dataset} holds no prompts")
    return prompts


def _rows(table, given: HubDataset, key: str) -> list[Example]:
    prompts, held = [], 0
    for i in range(len(table)):
        source = f"{given.dataset}[{given.split}]:{i}"
        try:
            row = table[i]
        except Exception as error:  # a damaged image, for which Pillow has many exceptions
            raise UserError(f"{source}: cannot be read: {brief(error)}") from None
        images = arrays_of([row[name] for name in given.images], source, ", ".join(given.images))
        held += sum(image.nbytes for image in images)
        if held > MOST_HELD:
            raise UserError(
                f"{key}: the images of the first {i + 1} of {len(table)} rows fill"
                f" {MOST_HELD >> 30} GB of memory in each process; choose a part, such as the split"
                ' "train[:1000]", or write the images to files and name them in a .jsonl file'
            )
        texts = {name: value for name, value in row.items() if name not in given.images}
        prompts.append(replace(_prompt(texts, source, given.column), images=images))
    return prompts


class PromptOrder:
    """A shuffled order of prompts, new in each epoch.

    `indices` cuts each epoch to a whole number of iterations, so that no iteration has a prompt
    twice; the prompts left out are other ones in each epoch. `at` does not cut, for `Curation`,
    which takes care of repeats itself.

    Args:
        count: number of prompts.
        per_iteration: prompts drawn for an iteration. UserError if it exceeds `count`.
        seed: the run's seed.
    """

    def __init__(self, count: int, per_iteration: int, seed: int):
        if per_iteration > count:
            raise UserError(
                f"data.prompts_per_iteration: {per_iteration}, but data.train holds only {count}"
                " prompts; add prompts, or lower the number"
            )
        self.count, self.per_iteration, self._seed = count, per_iteration, seed
        # Two epochs, since a draw that crosses an epoch's end reads from both. Cached per object:
        # a cache on the method would keep every object alive.
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def indices(self, iteration: int) -> list[int]:
        """The prompt indices of an iteration; iterations count from 0."""
        per_epoch = self.count // self.per_iteration
        epoch, place = divmod(iteration, per_epoch)
        return self._epoch(epoch)[
            place * self.per_iteration : (place + 1) * self.per_iteration
        ].tolist()

    def at(self, cursor: int) -> int:
        """The prompt index at a position of the endless order, in which whole epochs follow one
        another."""
        epoch, place = divmod(cursor, self.count)
        return int(self._epoch(epoch)[place])

    def reached(self, iterations: int) -> list[int]:
        """Indices of the prompts that the first `iterations` iterations can draw, ascending; used
        to embed no more prompts than a short run needs."""
        if iterations >= self.count // self.per_iteration:
            return list(range(self.count))
        return sorted(i for iteration in range(iterations) for i in self.indices(iteration))

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self.count)
