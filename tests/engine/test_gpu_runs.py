"""Training on a GPU as a user starts it; and the same runs in small on the CPU, so that what is
checked there has run somewhere.

`python -m pytest -m gpu tests/engine/test_gpu_runs.py` takes the GPU's part alone.
"""

import gpu_cases
import pytest
import torch
from run_cases import timeless

from tempflow.run.environment import device_name

pytestmark = pytest.mark.slow


def on_the_gpu(folder, settings):
    """A run and its resumed half on one GPU, both checked; the first of them."""
    whole, resumed = gpu_cases.whole_and_resumed(folder, settings, processes=1)
    gpu_cases.check_trained(whole, torch.cuda.get_device_name())
    gpu_cases.check_resumed(whole, resumed)
    return whole


def check_graphs(run):
    """Rollouts were replayed: every forward has one size, and none ran eagerly."""
    assert (
        all(row["rollout/padded_rows"] > 0 for row in run.rows[1:])
        and "eagerly" not in run.done.stdout
    )


@pytest.mark.gpu
def test_lora_stage1_with_graphs(tmp_path):
    check_graphs(on_the_gpu(tmp_path, gpu_cases.LORA))


@pytest.mark.gpu
def test_full_stage3(tmp_path):
    on_the_gpu(tmp_path, gpu_cases.FULL)


@pytest.mark.gpu
def test_float8_suffix(tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(
            "float8 products need compute capability 8.9, this GPU has"
            f" {torch.cuda.get_device_capability()}"
        )
    run = gpu_cases.start(tmp_path, "float8", gpu_cases.FLOAT8, processes=1)
    gpu_cases.check_trained(run, torch.cuda.get_device_name())
    check_graphs(run)
    assert all(row["suffix/reward_rank_correlation"] > 0.5 for row in run.rows[1:])


@pytest.mark.gpu
def test_two_gpus(tmp_path):
    """NCCL, ZeRO-3 over two cards, and the samples and update of one."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    check_ranks(tmp_path, gpu_cases.FULL, torch.cuda.get_device_name())


def check_ranks(folder, settings, device):
    one, two = (
        gpu_cases.start(folder, f"ranks-{ranks}", settings, processes=ranks) for ranks in (1, 2)
    )
    for run in (one, two):
        gpu_cases.check_trained(run, device)
    for a, b in zip(one.rows, two.rows, strict=True):
        assert a.get("images") == b.get("images")
        for key in ("eval/reward", "reward/mean"):
            assert key not in a or abs(a[key] - b[key]) <= 0.02 * abs(a[key]), key
    assert gpu_cases.cosine(gpu_cases.moved(one, 1, 2), gpu_cases.moved(two, 1, 2)) > 0.95


SMALL_RUNS = {"lora-stage1-float8": gpu_cases.FLOAT8, "full-stage3": gpu_cases.FULL}


@pytest.mark.cpu
@pytest.mark.parametrize("settings", SMALL_RUNS.values(), ids=SMALL_RUNS)
def test_the_same_runs_on_the_cpu(tmp_path, settings):
    """Where a resumed run is the same to the last bit."""
    whole, resumed = gpu_cases.whole_and_resumed(
        tmp_path, settings | gpu_cases.SMALL, processes=None
    )
    gpu_cases.check_trained(whole, device_name())
    gpu_cases.check_resumed(whole, resumed)
    assert [timeless(row) for row in whole.rows] == [timeless(row) for row in resumed.rows]
    assert torch.equal(gpu_cases.moved(whole, 1, 2), gpu_cases.moved(resumed, 1, 2))
    assert ("no GPU, so rollouts run eagerly" in whole.done.stdout) == settings.get(
        "rollout.graphs", False
    )
