"""What `python -m pytest -m gpu` selects on a machine with a GPU, seen on any machine; and that no
test there drifts to the CPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from cpu_cases import VARIABLE, on_cpu
from engine_cases import HERE, ROOT
from run_cases import environment

PLUGIN = """
import os, torch
try:
    import bitsandbytes  # with a GPU it asks the driver as soon as it is imported
except ImportError:
    pass
torch.cuda.is_available = lambda: True

def pytest_collection_finish(session):
    print("accelerator:", os.environ.get("DS_ACCELERATOR"), os.environ.get("TRITON_INTERPRET"))
"""
SWEEPS = [  # against float64, of every kernel
    "test_sde_step.py::test_matches_float64[",
    "test_group_loss.py::test_matches_float64[",
    "test_noise.py::test_normals_match_float64[",
    "test_noise.py::test_kernel_words_equal_reference_bit_for_bit[",
]
WHOLE = [  # graphs, float8, and runs
    "test_gpu_runs.py::test_lora_stage1_with_graphs",
    "test_gpu_runs.py::test_full_stage3",
    "test_gpu_runs.py::test_float8_suffix",
    "test_gpu_runs.py::test_two_gpus",
    "test_float8.py::test_on_the_hardware_eagerly_and_as_a_graph[flux]",
    *(
        f"test_gpu_families.py::test_graphs_on_the_gpu[{family}]"
        for family in ("flux", "sd3", "qwen_image")
    ),
]


def collect(folder, *arguments):
    """(ids selected, the plugin's line) of pytest on a machine that says it has a GPU. Nothing is
    run."""
    (folder / "with_a_gpu.py").write_text(PLUGIN)
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in (VARIABLE, "TRITON_INTERPRET")
    }
    env["PYTHONPATH"] = os.pathsep.join([str(folder), env.get("PYTHONPATH", "")])
    files = [
        HERE.parent / "kernels",
        *(HERE / f"test_{name}.py" for name in ("gpu_runs", "gpu_families", "float8")),
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "with_a_gpu",
        *arguments,
        *files,
    ]
    done = subprocess.run(
        list(map(str, command)), env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return [line.rpartition("/")[2] for line in lines if "::" in line], next(
        line for line in lines if line.startswith("accelerator:")
    )


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    return collect(tmp_path_factory.mktemp("plugin"), "-m", "gpu")


@pytest.mark.slow
def test_sweeps_graphs_float8_and_runs_are_selected(selected):
    ids, _ = selected
    for sweep in SWEEPS:
        found = [name for name in ids if name.startswith(sweep)]
        assert found and all("triton" in name for name in found), sweep
    assert not set(WHOLE) - set(ids)
    assert not [
        name for name in ids if "reference" in name.partition("[")[2] or "on_the_cpu" in name
    ]


@pytest.mark.slow
def test_nothing_there_is_set_to_the_cpu_or_interpreted(selected):
    """By a conftest, that is, for all tests; those that are marked for it are pinned one by one."""
    assert selected[1] == "accelerator: None None"


def test_a_run_takes_the_gpu_unless_its_test_is_pinned(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setenv(VARIABLE, "")  # so that what is set later is taken back
    monkeypatch.delenv(VARIABLE)
    assert environment()[VARIABLE] == "cpu", "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert VARIABLE not in environment()
    with on_cpu():
        assert environment()[VARIABLE] == "cpu" and get_accelerator().device_name() == "cpu"
    assert VARIABLE not in environment()


@pytest.mark.parametrize("marked", [True, False])
def test_the_marker_pins_a_test_and_no_other(request, monkeypatch, marked):
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    (conftest,) = (
        p
        for p in request.config.pluginmanager.get_plugins()
        if getattr(p, "__file__", "") == str(ROOT / "tests/conftest.py")
    )
    around = conftest.pytest_runtest_protocol(
        SimpleNamespace(get_closest_marker=lambda name: marked and name == "cpu")
    )
    next(around)
    assert os.environ.get(VARIABLE) == ("cpu" if marked else None)
    around.close()
    assert VARIABLE not in os.environ
