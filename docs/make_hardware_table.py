"""Writes the table of verified parts in README.md from benchmarks/results/hardware.json, and the copy
that the reports of runs read: python docs/make_hardware_table.py"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, SOURCE = ROOT / "README.md", ROOT / "benchmarks/results/hardware.json"
COPY = ROOT / "engine/tempflow/assets/verified.json"  # installed with the package
KEPT = ("path", "status", "card", "date")  # keys of an entry that reports need
BEGIN, END = "<!-- hardware:begin (python docs/make_hardware_table.py) -->", "<!-- hardware:end -->"
COLUMNS = {
    "unit": "tested on a CPU only",
    "simulated GPU": "tested on a CPU and a simulated GPU",
    "hardware": "run on a GPU",
}
ORDER = ("Families", "Methods", "Rewards")  # the first rows; other areas follow in the file's order


def table(entries: list[dict]) -> str:
    """The table: a row for each area, and in each column the parts whose strongest evidence is of
    that kind. make_models_table.py has more about model families."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    areas = dict.fromkeys(entry["area"] for entry in entries)
    # Areas that are not in ORDER have the same key, and sorting is stable.
    for area in sorted(areas, key=lambda area: (ORDER + (area,)).index(area)):
        own = [entry for entry in entries if entry["area"] == area]
        lines.append(f"| {area} | " + " | ".join(_cell(own, status) for status in COLUMNS) + " |")
    return "\n".join(lines)


def _cell(entries: list[dict], status: str) -> str:
    return ", ".join(_name(entry) for entry in entries if entry["status"] == status)


def _name(entry: dict) -> str:
    name = entry.get("name", entry["path"])
    return f"{name} ({entry['card']}, {entry['date']})" if entry["status"] == "hardware" else name


def files() -> dict[Path, str]:
    """The generated text of each file: README with its table, and the copy. ValueError if README
    lacks the markers."""
    text, entries = (
        README.read_text(encoding="utf-8"),
        json.loads(SOURCE.read_text(encoding="utf-8"))["paths"],
    )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    copied = [{key: entry[key] for key in KEPT if key in entry} for entry in entries]
    rows = ",\n".join(f" {json.dumps(entry)}" for entry in copied)
    return {
        README: f"{before}{BEGIN}\n{table(entries)}\n{END}{after}",
        COPY: f"[\n{rows}\n]\n",
    }


if __name__ == "__main__":
    for file, text in files().items():
        file.write_text(text, encoding="utf-8")
        print(file)
