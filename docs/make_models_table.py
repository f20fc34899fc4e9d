"""Writes the table in docs/models.md that says how far each model is verified:
python docs/make_models_table.py

The rows are the model families of `python -m tempflow components`. A cell is derived from the
parametrization of the tests that belong to its column, which run the families of
tests/engine/family_cases.py; the last column is read from benchmarks/results/hardware.json. So the
table cannot claim a test that does not exist.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, HARDWARE = ROOT / "docs/models.md", ROOT / "benchmarks/results/hardware.json"
BEGIN, END = "<!-- models:begin (python docs/make_models_table.py) -->", "<!-- models:end -->"
EQUAL = "equals its pipeline"
COLUMNS = {  # title: the module and the names of the tests that show it
    EQUAL: ("test_families", "test_sample_equals_the_pipeline"),
    "trains, resumes": ("test_family_runs", "test_training", "test_resuming"),
    "its export is read by diffusers": (
        "test_family_runs",
        "test_export_is_read_by_plain_diffusers",
    ),
    "CUDA graphs, with a stand-in": ("test_gpu_families", "test_the_same_comparison_on_the_cpu"),
    "simulated GPU": (
        "test_simulated_gpu",
        "test_nothing_captured_copies_or_reads",
        "test_an_update_reads_once_and_not_before_a_backward",
        "test_memory_of_rollouts_and_evaluations",
        "test_memory_of_training",
    ),
}
KINDS = {"lora": "LoRA", "full": "all weights"}
OWN = {  # models whose comparison with their pipeline is a test of its own
    "flux2_dev": {EQUAL: ("test_flux2", "test_sample_equals_the_pipeline")},
    "flux2_distilled": {EQUAL: ("test_flux2", "test_sample_equals_the_pipeline")},
    "qwen_image_edit_one": {EQUAL: ("test_qwen_image_edit", "test_sample_equals_the_pipeline")},
}


def table() -> str:
    from family_cases import FAMILIES, SIBLINGS

    from tempflow.registry import KINDS as COMPONENTS

    pipelines = COMPONENTS["policy"].ids
    lines = [
        "| models | pipeline in diffusers | " + " | ".join(COLUMNS) + " | run on a GPU |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    families = {**FAMILIES, **SIBLINGS}
    for pipeline in pipelines:
        for name in [n for n, one in families.items() if one.pipeline == pipeline] or [None]:
            models = families[name].models if name else "(not verified)"
            cells = [_shown(name, families, column) if name else "" for column in COLUMNS]
            lines.append(
                f"| {models} | `{pipeline}` | " + " | ".join(cells) + f" | {_on_hardware(name)} |"
            )
    return "\n".join(lines)


def _shown(name: str, families: dict, column: str) -> str:
    """The cell of one family in one column."""
    own = OWN.get(name, {}).get(column)
    if own:
        return "yes" if _there(*own) else ""
    module, *tests = COLUMNS[column]
    # a sibling's config is its family's, and so are the tests that go by it
    known = {name} if families[name].changes else {name, families[name].config}
    return _cell(known, module, tests)


def _cell(known: set[str], module: str, tests: list[str]) -> str:
    """What all the tests of a column show about a family: "", the kinds of training, or "yes".
    known: the names by which tests call the family: its own, and its config's."""
    shown = [
        [row for row in _parameters(getattr(importlib.import_module(module), test)) if known & row]
        for test in tests
    ]
    if not all(shown):
        return ""
    return (
        ", ".join(
            words
            for kind, words in KINDS.items()
            if all(any(kind in row for row in rows) for rows in shown)
        )
        or "yes"
    )


def _there(module: str, test: str) -> bool:
    """Whether a test exists. AttributeError if it was renamed or removed."""
    return callable(getattr(importlib.import_module(module), test))


def _parameters(test) -> list[set[str]]:
    """The texts in each row of a test's parametrizations."""
    rows = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            rows += [
                {
                    value
                    for value in (row if isinstance(row, tuple) else (row,))
                    if isinstance(value, str)
                }
                for row in mark.args[1]
            ]
    return rows


def _on_hardware(name: str | None) -> str:
    for entry in json.loads(HARDWARE.read_text(encoding="utf-8"))["paths"]:
        if entry["path"] == name and entry["status"] == "hardware":
            return f"{entry['card']}, {entry['date']}"
    return ""


def files() -> dict[Path, str]:
    """The generated text of the page with its table. ValueError if the page lacks the markers."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return {PAGE: f"{before}{BEGIN}\n{table()}\n{END}{after}"}


if __name__ == "__main__":
    # The tests' modules import each other by name, as under pytest.
    sys.path += [
        str(ROOT / folder)
        for folder in (
            "tests/engine",
            "tests/kernels",
            "recipes",
            "benchmarks",
            "engine",
            "kernels",
        )
    ]
    for file, text in files().items():
        file.write_text(text, encoding="utf-8")
        print(file)
