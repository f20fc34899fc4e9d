"""The benchmarks measure what they say: equal work, ratios to the right thing, figures that come from the data."""

import json
import sys

import learning
import numpy as np
import pytest
import suffix_fidelity
import throughput
import torch
from engine_cases import small_config, write_config
from kernel_cases import assert_close

SMALL = {
    "rollout": {"num_steps": 5, "children": 3, "branch_steps": "all", "micro_batch": 16},
    "training": {"kl_coef": 0.01, "micro_batch": 16, "ema": None},
}


@pytest.fixture(scope="module")
def bench():
    made = throughput.Bench(small_config(**SMALL))
    with made.pool:
        yield made


def test_the_papers_procedure_does_the_same_work(bench):
    """Its states, children and rewards are the engine's: only order, batches and sharing differ."""
    from tempflow.advantages import advantages

    collector = bench.collector(bench.config)
    data = collector.collect(0, bench.order.indices(0))
    sequential = throughput.Sequential(bench, bench.config)
    kept = {}
    train = throughput.train

    def keep(bench, config, collector, data, micro_batch):
        kept["data"] = data
        return train(bench, config, collector, data, micro_batch)

    throughput.train = keep
    try:
        result = sequential(0)
    finally:
        throughput.train = train
    assert len(kept["data"].decisions) == len(data.decisions) == 2 * 2 * 4
    for one, other in zip(sorted(kept["data"].decisions, key=lambda d: (d.unit.index, d.step)), data.decisions, strict=True):
        assert one.unit == other.unit and one.step == other.step
        assert_close("state", one.x, other.x, 1e-5)
        assert_close("children", one.x_next, other.x_next, 1e-5)
    np.testing.assert_allclose(kept["data"].rewards, data.rewards, atol=2e-3)
    assert advantages(data.rewards, group="seed", global_std=False, clip=5).values.any()
    # 4 units: a trunk of 4 forwards, and 3 children at each of 4 branch steps, each with a first forward and its suffix
    assert result.forwards["rollout"] == 4 * (4 + 3 * (5 + 4 + 3 + 2))


def test_variants_count_what_they_run(bench):
    rows = throughput.measure(bench, rounds=1, only=None)
    by_name = {row["variant"]: row for row in rows}
    assert list(by_name)[0] == "paper's procedure"
    engine, separate = by_name["engine"], by_name["engine, one forward per child"]
    assert separate["forwards"]["train"] == by_name["paper's procedure"]["forwards"]["train"] == 3 * engine["forwards"]["train"]
    assert separate["forwards"]["rollout"] == engine["forwards"]["rollout"] == 4 * (5 + 3 * (4 + 3 + 2 + 1))
    assert by_name["Flow-GRPO, as many pictures"]["images"] == 2 * 2 * 4 * 3
    peaks = {"rollout": 1e9, "train": 1e9}
    throughput.add_ratios(rows, 10**6, peaks, bench.config)
    assert rows[0]["times_faster"] == rows[0]["train_times_faster"] == 1
    rollout = engine["forwards"]["rollout"] * 1e6 / engine["seconds"]["rollout"] / 1e9
    assert engine["mfu_rollout"] == pytest.approx(rollout)
    # one update and one pass of the reference: rows count 3 and 1 forwards
    assert engine["mfu_train"] == pytest.approx(engine["forwards"]["train"] * 2 * 1e6 / engine["seconds"]["train"] / 1e9)


@pytest.mark.slow
def test_throughput_as_a_command(tmp_path, monkeypatch):
    config = write_config(tmp_path, **SMALL)
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--config", str(config), "--rounds", "1", "--only", "paper", "engine",
                                      "--output", str(tmp_path)])  # fmt: skip
    assert throughput.main() == 0
    (report,) = tmp_path.glob("throughput-small-*.json")
    record = json.loads(report.read_text())
    assert {"date", "device", "versions", "config", "rows"} <= record.keys() and len(record["rows"]) == 4
    assert report.with_suffix(".png").stat().st_size > 5000


# --------------------------------------------------------------------------------------------------- suffix fidelity
def test_fidelity_compares_with_the_exact_suffix():
    config = small_config()
    rng = np.random.default_rng(0)
    exact = rng.random((2, 2, 3, 6))
    options = {name: {"rewards": [exact], "rollout_s": 2.0, "total_s": 3.0, "forwards": 100} for name in suffix_fidelity.OPTIONS}
    options["one jump"] = {"rewards": [1 - exact], "rollout_s": 0.5, "total_s": 1.5, "forwards": 25}
    options["every 3rd, order 2"] = {"rewards": [np.where(exact > 0.9, np.nan, exact)], "rollout_s": 1.0, "total_s": 3.0, "forwards": 50}
    rows = {row["option"]: row for row in suffix_fidelity.compare(config, {"steps": [0, 4, 8], "options": options})}
    assert rows["exact"]["advantage_rank_correlation"] == pytest.approx(1) and rows["exact"]["rollout_speedup"] == 1
    jump = rows["one jump"]
    assert jump["reward_rank_correlation"] == pytest.approx(-1) and jump["advantage_rank_correlation"] == pytest.approx(-1)
    assert (jump["forwards_ratio"], jump["rollout_speedup"], jump["iteration_speedup"]) == (4, 4, 2)
    assert set(jump["by_step"]) == {"0", "4", "8"}
    assert rows["every 3rd, order 2"]["reward_rank_correlation"] == pytest.approx(1), "pictures that failed in either are left out"


# ---------------------------------------------------------------------------------------------------------- learning
def test_curves_meet_where_all_of_them_reach():
    curves = [[{"minutes": m, "reward": r} for m, r in points] for points in ([(0, 0.4), (4, 0.8)], [(0, 0.5), (2, 0.5), (8, 0.9)])]
    grid, rewards = learning.on_grid(curves, "minutes")
    assert grid[0] == 0 and grid[-1] == 4 and rewards.shape == (2, len(grid))
    assert rewards[0, 0] == 0.4 and rewards[0, -1] == 0.8 and rewards[1, -1] == pytest.approx(0.5 + 0.4 / 3)


def test_the_level_is_where_the_baseline_ends_and_ratios_are_of_reaching_it():
    def run(slope, end=9.0):
        minutes = np.arange(0, end + 0.1, 0.1)
        return {"curve": [{"minutes": m, "forwards": 10 * m, "images": m, "reward": min(slope * m, 0.6)} for m in minutes]}

    found = learning.level_reached({"fast": [run(0.4)], "never": [run(0.01)], "slow": [run(0.1)]}, "slow")
    assert found["level"] == pytest.approx(0.6) and found["needed"]["fast"]["minutes"] == pytest.approx(1.5, abs=0.2)
    assert found["needed"]["slow"]["minutes_times_less"] == 1.0
    assert found["needed"]["fast"]["forwards_times_less"] == pytest.approx(4, rel=0.15)
    assert found["needed"]["never"]["minutes"] is None and found["needed"]["never"]["minutes_times_less"] is None


def test_a_curve_counts_a_backward_as_two_forwards(tmp_path):
    rows = [
        {"iteration": 0, "eval/reward": 0.4},
        {"iteration": 1, "forwards/rollout": 100, "forwards/train": 10, "images/total": 8, "time/elapsed": 60.0},
        {"iteration": 2, "forwards/rollout": 100, "forwards/train": 10, "images/total": 16, "time/elapsed": 120.0, "eval/reward": 0.6},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, last = learning.curve(tmp_path)
    assert (first["forwards"], first["minutes"], first["reward"]) == (0, 0, 0.4)
    assert (last["forwards"], last["minutes"], last["images"], last["reward"]) == (260, 2, 16, 0.6)


def test_every_variant_is_a_config():
    from tempflow.config import load_config

    for variant, changes in learning.VARIANTS.items():
        config = load_config(learning.ROOT / "configs/tiny_ocr.json", changes)
        assert (config.rollout.plan == "flow_grpo") == (variant in ("flow_grpo", "without branching"))


def test_peak_is_a_rate():
    assert 1e8 < throughput.matmul_peak(torch.float32, torch.device("cpu")) < 1e14
