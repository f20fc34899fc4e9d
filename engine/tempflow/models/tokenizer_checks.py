"""Checks whether a checkpoint's tokenizer turns text into tokens that its text encoder has, before
any weight is loaded. It is loaded for this, because its files are small."""

from __future__ import annotations

import json
from pathlib import Path

from tempflow.errors import brief
from tempflow.models.component import Component, problem_with_file

PROBE = "a photo of a cat, 123"  # common words, which every vocabulary has


def check_tokenizer(component: Component) -> None:
    """Raise a UserError for a tokenizer that cannot be loaded, knows no words, or makes tokens that
    its text encoder does not have."""
    try:
        tokenizer = component.type.from_pretrained(str(component.path))
        tokens = tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids
    except Exception as error:
        raise component.error(
            _problem_with_tokenizer(component)
            or f"cannot be loaded as a {component.kind}: {brief(error)}"
        ) from None
    known = set(tokens) - {tokenizer.unk_token_id, *tokenizer.all_special_ids}
    # Half of the tokens must be known, not one: a T5 tokenizer with an empty vocabulary still knows
    # the space between words.
    if 2 * sum(token in known for token in tokens) <= len(tokens):
        raise component.error(
            _problem_with_tokenizer(component) or "has an empty vocabulary; download it again"
        )
    encoder = component.folder / component.name.replace("tokenizer", "text_encoder") / "config.json"
    size, highest = (
        _vocabulary(encoder),
        max(tokens + ([] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id])),
    )
    if size is not None and highest >= size:
        raise component.error(
            f"makes token {highest}, but {encoder} has vocab_size {size}; the two are of different"
            " models, download both again"
        )


def _vocabulary(config: Path) -> int | None:
    """The vocabulary size of a text encoder's config; None where it does not say."""
    try:
        table = json.loads(config.read_text(encoding="utf-8"))
        return table.get("vocab_size") or table.get("text_config", {}).get("vocab_size")
    except (OSError, ValueError, AttributeError):  # reported by the encoder's own check
        return None


def _problem_with_tokenizer(component: Component) -> str | None:
    """What is wrong with the files of a tokenizer that failed; None if they look sound."""
    files = (
        sorted(file for file in component.path.iterdir() if file.is_file())
        if component.path.is_dir()
        else []
    )
    for file in files:
        problem = (
            problem_with_file(file)
            if file.suffix == ".safetensors"
            else _problem_with_text_file(file)
        )
        if problem:
            return f"does not work: {file.name} {problem}"
    vocabularies = (
        "tokenizer.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
    )
    if not {file.name for file in files} & set(vocabularies):
        return f"holds no vocabulary (none of {', '.join(vocabularies)}); download it again"
    return None


def _problem_with_text_file(file: Path) -> str | None:
    try:
        start = file.read_bytes()
        if not start:
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
        if file.suffix == ".json":
            json.loads(start)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (ValueError, RecursionError):
        return "is damaged: it is not valid JSON"
    return None
