"""Writes README's table of what has run on which hardware from benchmarks/results/hardware.json, and
the copy that reports of runs read: python docs/make_hardware_table.py"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, SOURCE = ROOT / "README.md", ROOT / "benchmarks/results/hardware.json"
COPY = ROOT / "engine/tempflow/assets/verified.json"  # installed with the package
KEPT = ("path", "status", "card", "date")
BEGIN, END = "<!-- hardware:begin (python docs/make_hardware_table.py) -->", "<!-- hardware:end -->"
COLUMNS = {
    "unit": "tests on a CPU only",
    "simulated GPU": "and on a simulated GPU",
    "hardware": "on hardware",
}
ORDER = ("Families", "Methods", "Rewards")  # first, in this order


def table(entries: list[dict]) -> str:
    """A row for every area; in each column the parts whose best evidence is of that kind. More on
    model families: make_models_table.py."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    areas = dict.fromkeys(entry["area"] for entry in entries)
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
    """What is generated: the text of README with its table, and the copy. ValueError where README's
    markers are missing."""
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
