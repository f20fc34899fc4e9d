"""Read a config: the JSON file, `--set` overrides, and error messages in the user's key names."""

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
        source: a JSON file, or its content as a dict, in which logging.name is required. Relative
            paths in a dict are looked up as in a file in the working directory. The dict is not
            changed.
        overrides: texts `section.key=value`, whose values are JSON or bare strings. If several set
            the same key, the last one counts, and a note says so.

    Returns:
        The config, with all defaults, and with paths as they were found.

    Raises:
        UserError: names the key, the value that came and what is allowed.
    """
    tabled = isinstance(source, dict)
    file = Path("config") if isinstance(source, dict) else Path(source)
    data = _copied(source) if isinstance(source, dict) else _read_tables(file)
    if places.STARTED_IN in data and not tabled:
        # The config.json of a run directory. The run may have been moved, written by an earlier
        # version, or use modules of the folder that it was started in.
        sys.path.extend(
            folder for folder in places.module_folders(data, file.parent) if folder not in sys.path
        )
        places.relocate(data, file.parent)
        translate(data)
    # $schema is for editors. Only these two top-level keys are ignored, any other unknown key is an
    # error.
    data = {key: value for key, value in data.items() if key not in ("$schema", places.STARTED_IN)}
    # Overrides come before ~ is expanded, because their values may contain one.
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
            "logging.name: required in a config that is a dict; it names the run directory"
        )
    if config.logging.name is None:
        config.logging.name = file.stem
    return config


def _copied(table: dict) -> dict:
    """A copy of nested dicts as a JSON file would hold them; paths become texts."""
    # Through text and back: so tuples become lists, and NaN and the like are refused as in a file.
    try:
        return strict_json.loads(json.dumps(table, default=os.fspath))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"config: cannot be written as JSON: {brief(error)}") from None


def _read_tables(file: Path) -> dict:
    try:
        # utf-8-sig: some editors write a byte order mark, which JSON does not allow.
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
    """Check nested tables and return them as a Config.

    Paths are not looked up; `load_config` does that.

    Args:
        data: the content of a config file.

    Raises:
        UserError: one line for each key that is refused.
    """
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
        # Not an error: scripts that wrap a command append to its options.
        for earlier in seen:
            if earlier == name or earlier.startswith(f"{name}."):
                note(
                    f"--set {earlier} is given before --set {name}={shortened(text, VALUE)}, which"
                    " replaces it"
                )
        seen.append(name)


def _set(data: dict, name: str, value) -> None:
    """Set a dotted key in nested tables, which are made where they are missing."""
    *sections, key = name.split(".")
    parent, inner = {}, data
    for place, section in enumerate(sections):
        # "rollout.plan.seeds=8" where rollout.plan is the bare text "flow_grpo" or missing: the
        # text becomes a table, so that an option can be set beside it.
        if ".".join(sections[: place + 1]) in registry.IN_CONFIG and not isinstance(
            inner.get(section), dict
        ):
            inner[section] = {"type": inner[section]} if inner.get(section) is not None else {}
        parent, inner = inner, inner.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {name}: {section} is not a table")
    # "rollout.plan.type=tree" means the same as "rollout.plan=tree".
    if key == "type" and ".".join(sections) in registry.IN_CONFIG:
        name, inner, key = ".".join(sections), parent, sections[-1]
    if name in registry.IN_CONFIG and isinstance(value, str):
        value = _retyped(name, inner.get(key), value)
    inner[key] = value


def _retyped(name: str, was, kind: str) -> dict:
    """A component's table after its type was set.

    Another type drops the options of the one before, which it may not have; the same type keeps
    them.
    """
    before = was if isinstance(was, dict) else {}
    same = before.get("type", registry.KINDS[registry.IN_CONFIG[name]].default) == kind
    return {**before, "type": kind} if same else {"type": kind}


def _value_of(name: str, text: str):
    """The value of an override: JSON, or else the text itself."""
    try:
        return strict_json.loads(text)
    except json.JSONDecodeError:
        return _bare(name, text)
    # JSON by its grammar, but refused (a key given twice): a mistake, not a bare text.
    except (ValueError, RecursionError) as error:
        raise UserError(f"--set {name}: {error}, in {shortened(text, VALUE)}") from None


def _bare(name: str, text: str) -> str:
    try:
        return strict_json.check_text(text)
    except strict_json.Refused as error:
        raise UserError(f"--set {name}: {error}") from None


def _found_from(key: str, path: str, config_file: Path) -> str:
    """Look a relative path up in the working directory, then in each folder above the config file.

    So a shipped config works from any folder. A path that is found nowhere stays as it is: it may
    be a hub id, and whoever opens it reports a missing file. Raises UserError.
    """
    try:
        if Path(path).exists() or Path(path).is_absolute():
            return path
        for folder in config_file.resolve().parents:
            if (folder / path).exists():
                return str(folder / path)
    except (OSError, ValueError) as error:
        # Too long for a file name, or with a NUL character.
        raise UserError(
            f"{key}: {shown(path)} cannot be a path:"
            f" {error if isinstance(error, ValueError) else error.strerror}"
        ) from None
    return path


# Pydantic's own messages for these speak of characters and items.
_EMPTY = {
    "string_too_short": "expected a text that is not empty, got ''",
    "too_short": "expected a list that is not empty, got []",
}


def _explain(error: dict) -> str:
    """One error of pydantic in a line, in the user's key names."""
    parts = [str(p) for p in error["loc"]]
    # Keys may come from anywhere: a newline or a megabyte in one must not spoil the message.
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
        return f"{name}: required, but missing"
    # Errors of `Config._agree` have no location; their text begins with the key.
    if error["type"] == "value_error" and not name:
        return str(error["ctx"]["error"])
    if parts[-1:] == ["[key]"]:
        return (
            f"{'.'.join(parts[:-2])}: expected keys that are texts and not empty, got"
            f" {shown(error['input'])}"
        )
    if error["type"] in _EMPTY:
        return f"{name}: {_EMPTY[error['type']]}"
    # Pydantic puts "Value error, " before the text of a section's own check.
    text = error["msg"].removeprefix("Value error, ")
    return f"{name}: {text[0].lower() + text[1:]}, got {shown(error['input'])}"


def _known_keys(parts: list[str]) -> list[str]:
    """The keys of a section, given by its path from the top."""
    model: type[BaseModel] = Config
    for part in parts:
        annotation = model.model_fields[part].annotation
        # An optional section is a union: take its member that is a model.
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
