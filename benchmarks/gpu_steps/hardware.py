"""Reads and writes hardware.json, which records how far each part of the engine is verified.

An entry is one part of the engine, in an area. Its `status` is "unit" (tests on a CPU), "simulated
GPU" (tests that run the engine on tensors that report a GPU) or "hardware". Its `evidence` is the
test file, or the step of gpu.py, that shows it. Entries of status "hardware" name the card and the
date. A run of gpu.py on a CUDA card sets entries to "hardware"; no run takes this back.
"""

from __future__ import annotations

import json
from pathlib import Path

from tempflow.errors import UserError
from tempflow.run.logs import write_atomic

FILE = Path(__file__).parents[1] / "results/hardware.json"
STATUSES = ("unit", "simulated GPU", "hardware")


def load() -> list[dict]:
    """The entries. UserError if the file is missing or damaged."""
    try:
        return json.loads(FILE.read_text())["paths"]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{FILE}: missing or damaged: {error}") from None


def upgraded(entries: list[dict], proved: dict[str, str], card: str, date: str) -> list[dict]:
    """The entries after a run. proved: by path, the step that showed it. KeyError for a path
    without an entry."""
    unknown = proved.keys() - {entry["path"] for entry in entries}
    if unknown:
        raise KeyError(f"no entry in hardware.json: {', '.join(sorted(unknown))}")
    return [
        (
            entry
            | {
                "status": "hardware",
                "evidence": f"gpu.py: {proved[entry['path']]}",
                "card": card,
                "date": date,
            }
            if entry["path"] in proved
            else entry
        )
        for entry in entries
    ]


def write(entries: list[dict]) -> None:
    rows = ",\n".join("  " + json.dumps(entry) for entry in entries)
    write_atomic(FILE, f'{{"paths": [\n{rows}\n]}}\n')
