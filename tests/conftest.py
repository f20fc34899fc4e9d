"""What a machine with a GPU and one without do differently in the tests.

Without a GPU the Triton kernels run interpreted, which has to be set before anything imports
triton, as diffusers and transformers do, and tests marked `gpu` are skipped. With one, every test
that runs a kernel on it is marked `gpu`, so that `-m gpu` is all of a GPU's part. Tests marked
`cpu` stay on the CPU wherever they run.

UNIT names the files of quick tests, which `-m unit` selects: no training run and no model but a
stub, so that together they take a minute.
"""

import atexit
import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest
import torch

# Workers side by side (pytest -n) share out the cores: torch's threads wait in busy loops, many
# times slower where two need one core.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores, count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    mine = cores[int(worker.removeprefix("gw")) % len(cores) :: count]
    os.sched_setaffinity(0, mine)
    torch.set_num_threads(len(mine))
    os.environ["OMP_NUM_THREADS"] = str(len(mine))  # of processes that tests start

sys.path.append(str(Path(__file__).parent / "engine"))
from cpu_cases import on_cpu  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
gc.disable()


UNIT = {
    "engine": """advantages checkpoint config config_refusals curation dockerfile drift errors
    fake_gpu layout models_table objectives penalties processors prompt_images prompts pulls release
    repeats sde shipped_configs strictness unequal_children weights""",
    "report": "byproducts comparison console metrics report verdict",
    "rewards": """normal_form quotes reward_combine reward_fit reward_geneval reward_ocr
    reward_vlm""",
}
UNIT = {Path(folder, f"test_{name}.py") for folder in UNIT for name in UNIT[folder].split()}


def pytest_ignore_collect(collection_path, config):
    """With -m unit, files without unit tests are not imported, which takes longer than many of the
    tests."""
    if config.option.markexpr != "unit" or not collection_path.name.startswith("test_"):
        return None
    return collection_path.relative_to(Path(__file__).parent) not in UNIT or None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    there, here = torch.cuda.is_available(), Path(__file__).parent
    for item in items:
        if item.path.relative_to(here) in UNIT and not item.get_closest_marker("slow"):
            item.add_marker("unit")
        if there and _parameters(item).get("device") == "triton":
            item.add_marker("gpu")
        if not there and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU"))
    items.sort(key=_place(items))


def _place(items):
    """Files with slow tests first, files of unit tests last: workers that take a file at a time
    (xdist with --no-loadscope-reorder) end together when the last files are short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    quick = {item.path for item in items if item.get_closest_marker("unit")}
    return lambda item: (item.path not in slow, item.path in quick)


def _parameters(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def pytest_collection_finish():
    """What was imported stays: the collector, off until here, need not look at it again and
    again."""
    gc.collect()
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # or nanobind reports what its modules hold as leaked


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """A file's memory goes back to the system after its last test: cycles, which models and engines
    are, and what the C library keeps for its next allocations."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Around a test's fixtures, too, whatever their scope, since one that many tests share belongs
    to the first."""
    if not item.get_closest_marker("cpu"):
        return (yield)
    with on_cpu():
        return (yield)
