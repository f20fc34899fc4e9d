"""The machine code of every kernel specialisation that production uses, for GPUs that need not be
here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiling the kernels needs triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIND = f"import sys; sys.path.append({str(BENCHMARKS)!r})"

# Loads that are not of whole blocks: scalars of a row and, once per row, advantages and old
# log-probabilities.
MOST_NARROW_LOADS = 12


def run_aot(*arguments, path=None):
    """In a process of its own: this one may hold interpreted kernels. path: where to look for
    packages first."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(path), *filter(None, [environment.get("PYTHONPATH")])]
        )
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "report.json"
    print(run_aot(str(BENCHMARKS / "aot.py"), "--json", str(path)))
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def cuda_rows(rows):
    return [row for row in rows if row["target"].startswith("sm_")]


def names(rows):
    return [f"{row['kernel']} for {row['target']}" for row in rows]


def test_every_kernel_compiles_for_every_target(rows):
    kernels = {row["kernel"] for row in rows}
    assert {name.split()[0] for name in kernels} == {
        "normal",
        "sde_step",
        "group_loss",
        "group_loss_backward",
    }
    assert {(row["kernel"], row["target"]) for row in rows} == {
        (kernel, target) for kernel in kernels for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    }


def test_no_spills_and_no_local_memory(rows):
    assert not names(
        row for row in rows if row["local"] or row["local_accesses"] or row.get("stack")
    )


def test_blocks_move_in_16_byte_accesses(cuda_rows):
    assert all(row["wide_loads_expected"] + row["wide_stores_expected"] > 0 for row in cuda_rows)
    assert not names(row for row in cuda_rows if row["wide_loads"] < row["wide_loads_expected"])
    assert not names(row for row in cuda_rows if row["wide_stores"] < row["wide_stores_expected"])
    assert not names(row for row in cuda_rows if row["narrow_loads"] > MOST_NARROW_LOADS)


def test_an_ode_row_makes_no_noise(cuda_rows):
    """A path from entry to exit stores the children without a single Philox multiply; `normal` has
    no such path."""
    assert all(
        row["ode_path_without_noise"] for row in cuda_rows if row["kernel"].startswith("sde_step")
    )
    assert not any(row["ode_path_without_noise"] for row in cuda_rows if row["kernel"] == "normal")


def test_noise_stays_within_its_instruction_budget(cuda_rows):
    """Guards the arithmetic limit that kernels/README.md states: instructions per element of a
    child, all included."""
    counts = [(row, row["noise_instructions_per_element"]) for row in cuda_rows]
    assert sum(count is not None for _, count in counts) >= 15
    assert not names(row for row, count in counts if count is not None and count > 42)


def launch_rows(path=None):
    """(version of Triton, rows) of what the launcher makes of the kernels, and the row of a kernel
    whose length is no multiple of 16."""
    code = (
        f"{FIND}; import json, aot, triton; from triton.backends.compiler import GPUTarget; "
        "v = aot.step('odd', 'fp32', 'fp32', 'fp32', sizes={}); "
        "odd = aot.inspect_cuda(v, aot.compile_for(v, GPUTarget('cuda', 90, 32))); "
        "print(json.dumps([triton.__version__, aot.launch_report(), odd]))"
    )
    return json.loads(run_aot("-c", code, path=path).splitlines()[-1])


@pytest.fixture(scope="module")
def launched():
    return launch_rows()


def check_launches(rows):
    assert len(rows) == 11 and {row["kernel"].split()[0] for row in rows} == {
        "normal",
        "sde_step",
        "group_loss",
        "group_loss_backward",
    }
    assert not names(row for row in rows if row["local"] or row["local_accesses"] or row["stack"])
    flux = [row for row in rows if "numel=262144" in row["kernel"]]
    assert len(flux) == 7 and not names(
        row for row in flux if row["wide_loads"] < row["wide_loads_expected"]
    )
    assert not names(
        row
        for row in flux
        if row["wide_stores"] < row["wide_stores_expected"]
        or row["narrow_loads"] > MOST_NARROW_LOADS
    )


def test_what_the_launcher_makes(launched):
    """It turns sizes of 1 into constants and tells the compiler of multiples of 16: other code than
    `variants` of any size."""
    check_launches(launched[1])


def test_what_the_launcher_makes_with_the_triton_of_cuda_builds():
    """torch's CUDA build pins an older Triton than the one that is newest here."""
    found = sorted(Path(sys.prefix).glob("triton-*"))
    if not found:
        pytest.skip(f"no {sys.prefix}/triton-VERSION; `make test` installs one")
    version, rows, _ = launch_rows(found[-1])
    assert version == found[-1].name.removeprefix("triton-")
    check_launches(rows)


def test_the_checks_see_narrow_accesses(launched):
    """Rows of a length that is no multiple of 16 cannot move in 16-byte accesses: the same
    inspection must say so."""
    row = launched[2]
    assert (
        row["wide_loads"] < row["wide_loads_expected"] and row["narrow_loads"] > MOST_NARROW_LOADS
    )
