"""The table of docs/models.md says what the tests over family_cases.py show, and hardware.json has
a line for every family."""

import importlib.util
import json

import family_cases
import pytest
from engine_cases import ROOT
from family_cases import FAMILIES

from tempflow.registry import KINDS


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "make_models_table", ROOT / "docs/make_models_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_it_as_the_tests_are_now(script):
    for file, text in script.files().items():
        assert file.read_text(encoding="utf-8") == text, "python docs/make_models_table.py"


def test_every_family_is_named_and_known():
    paths = [
        entry["path"]
        for entry in json.loads(
            (ROOT / "benchmarks/results/hardware.json").read_text(encoding="utf-8")
        )["paths"]
        if entry["area"] == "Families"
    ]
    assert sorted(paths) == sorted(FAMILIES), (
        "an entry for each in benchmarks/results/hardware.json"
    )
    assert all(
        family.models and family.pipeline in KINDS["policy"].ids for family in FAMILIES.values()
    )


def test_a_cell_needs_a_test(script, monkeypatch):
    """A family without an entry is said to be verified by none of them, and so is one that a test
    leaves out."""
    import test_family_runs

    row = next(line for line in script.table().splitlines() if "`FluxPipeline`" in line)
    assert row.count("yes") >= 3 and "| LoRA, all weights |" in row
    mark = pytest.mark.parametrize("name, kind", [("sd3", "lora"), ("flux", "lora")])
    monkeypatch.setattr(test_family_runs.test_resuming, "pytestmark", [mark.mark])
    changed = next(line for line in script.table().splitlines() if "`FluxPipeline`" in line)
    assert changed == row.replace("| LoRA, all weights |", "| LoRA |", 1)
    monkeypatch.delitem(family_cases.FAMILIES, "flux")
    assert "| (not verified) | `FluxPipeline` |  |  |" in script.table()
