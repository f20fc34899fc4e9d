"""Reading a config: the JSON file, `--set` overrides, and the message of every refusal in the
user's key names."""

from __future__ import annotations

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Sequence

from pydantic import BaseModel, ValidationError

from tempflow import registry
from tempflow.config import strict_json
from tempflow.config.moved import MOVED, translate
from tempflow.config.schema import Config
from tempflow.config.sections import HubDataset
from tempflow.errors import VALUE, UserError, brief, note, shortened, shown
from tempflow.run import places


def load_config(source: str | Path | dict, overrides: Sequence[str] = ()) -> Config:
    """Read a config, apply overrides, and check it.

    Args:
        source: a JSON file, or its content as nested tables, in which logging.name is required;
            paths in tables are looked up as those of a file in the working directory. Tables stay
            as they are.
        overrides: `section.key=value` texts with JSON values or bare strings. Of those that set one
            key the last counts, and a note says so.

    Raises UserError naming the key, the value that came and what is allowed.
    """
    tabled = isinstance(source, dict)
    file = Path("config") if isinstance(source, dict) else Path(source)
    data = _copied(source) if isinstance(source, dict) else _read_tables(file)
    if places.STARTED_IN in data and not tabled:  # a run's own config.json
        sys.path.extend(
            folder for folder in places.module_folders(data, file.parent) if folder not in sys.path
        )
        places.relocate(data, file.parent)
        translate(data)
    # for editors; for scripts
    data = {key: value for key, value in data.items() if key not in ("$schema", places.STARTED_IN)}
    _apply_overrides(data, overrides)
    places.expanded(data)
    config = parse_config(data)
    config.model.path = _found_from("model.path", config.model.path, file)
    if config.model.lora and config.model.lora.start is not None:
        config.model.lora.start = _found_from("model.lora.start", config.model.lora.start, file)
    for key in ("train", "heldout"):
        given = getattr(config.data, key)
        if isinstance(given, HubDataset):
            given.dataset = _found_from(f"data.{key}.dataset", given.dataset, file)
        elif given is not None:
            setattr(config.data, key, _found_from(f"data.{key}", given, file))
    if config.logging.name is None and tabled:
        raise UserError(
            "logging.name: required in a config that is a table; it names the run directory"
        )
    if config.logging.name is None:
        config.logging.name = file.stem
    return config


def _copied(table: dict) -> dict:
    """Nested tables as a JSON file would hold them; paths become texts."""
    try:
        return strict_json.loads(json.dumps(table, default=os.fspath))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"config: cannot be written as JSON: {brief(error)}") from None


def _read_tables(file: Path) -> dict:
    try:
        data = strict_json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"config file {file} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"config file {file} is a folder") from None
    except OSError as error:
        raise UserError(f"config file {file} cannot be read: {error}") from None
    except strict_json.Refused as error:
        raise UserError(f"config file {file}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"config file {file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(
            f"config file {file}: expected a table of sections, got {type(data).__name__}"
        )
    return data


def parse_config(data: dict) -> Config:
    """A checked Config of nested tables; UserError as in `load_config`."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(_explain(dict(item)) for item in error.errors())) from None


def _apply_overrides(data: dict, overrides: Sequence[str]) -> None:
    seen: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not all(name.split(".")):
            raise UserError(f"--set {shortened(override, VALUE)}: expected section.key=value")
        _set(data, name, _value_of(name, text))
        for earlier in seen:
            if earlier == name or earlier.startswith(f"{name}."):
                note(
                    f"--set {earlier} is given before --set {name}={shortened(text, VALUE)}, which"
                    " replaces it"
                )
        seen.append(name)


def _set(data: dict, name: str, value) -> None:
    *sections, key = name.split(".")
    parent, inner = {}, data
    for place, section in enumerate(sections):
        if ".".join(sections[: place + 1]) in registry.IN_CONFIG and not isinstance(
            inner.get(section), dict
        ):
            inner[section] = {"type": inner[section]} if inner.get(section) is not None else {}
        parent, inner = inner, inner.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {name}: {section} is not a table")
    if key == "type" and ".".join(sections) in registry.IN_CONFIG:
        name, inner, key = ".".join(sections), parent, sections[-1]
    if name in registry.IN_CONFIG and isinstance(value, str):
        value = _retyped(name, inner.get(key), value)
    inner[key] = value


def _retyped(name: str, was, kind: str) -> dict:
    """A component of another type, without the options of the one before; of the same type, with
    them."""
    before = was if isinstance(was, dict) else {}
    same = before.get("type", registry.KINDS[registry.IN_CONFIG[name]].default) == kind
    return {**before, "type": kind} if same else {"type": kind}


def _value_of(name: str, text: str):
    """The JSON value of an override, or the bare text where it is none."""
    try:
        return strict_json.loads(text)
    except json.JSONDecodeError:
        return _bare(name, text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--set {name}: {error}, in {shortened(text, VALUE)}") from None


def _bare(name: str, text: str) -> str:
    try:
        return strict_json.check_text(text)
    except strict_json.Refused as error:
        raise UserError(f"--set {name}: {error}") from None


def _found_from(key: str, path: str, config_file: Path) -> str:
    """A relative path is looked up from the working directory, then from each folder above the
    config file."""
    try:
        if Path(path).exists() or Path(path).is_absolute():
            return path
        for folder in config_file.resolve().parents:
            if (folder / path).exists():
                return str(folder / path)
    except (
        OSError,
        ValueError,
    ) as error:  # too long for a file name, or characters that none can have
        raise UserError(
            f"{key}: {shown(path)} cannot be a path:"
            f" {error if isinstance(error, ValueError) else error.strerror}"
        ) from None
    return path


_EMPTY = {
    "string_too_short": "expected a text that is not empty, got ''",
    "too_short": "expected a list that is not empty, got []",
}


def _explain(error: dict) -> str:
    """One line of a pydantic error, in the user's key names."""
    parts = [str(p) for p in error["loc"]]
    name = ".".join(
        part if part.isprintable() and len(part) < VALUE else shown(part) for part in parts
    )
    if error["type"] == "extra_forbidden" and name in MOVED:
        return f"{name}: {MOVED[name]}"
    if error["type"] == "extra_forbidden":
        known = _known_keys(parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"{name}: unknown key{hint} Allowed here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{name}: required, and missing"
    if error["type"] == "value_error" and not name:
        return str(error["ctx"]["error"])
    if parts[-1:] == ["[key]"]:
        return (
            f"{'.'.join(parts[:-2])}: expected keys that are texts and not empty, got"
            f" {shown(error['input'])}"
        )
    if error["type"] in _EMPTY:
        return f"{name}: {_EMPTY[error['type']]}"
    return f"{name}: {error['msg'][0].lower() + error['msg'][1:]}, got {shown(error['input'])}"


def _known_keys(parts: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in parts:
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
