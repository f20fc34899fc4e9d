"""The benchmarks measure what they say: equal work, ratios to the right thing, figures that come
from the data."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import host_seconds
import learning
import numpy as np
import pytest
import suffix_fidelity
from engine_cases import dense_slots

from tempflow.advantages.group import Group
from tempflow.errors import UserError
from tempflow.types import Rewards


# ---------------------------------------------------------------------------------- suffix fidelity
def test_fidelity_compares_with_the_exact_suffix():
    rng, slots = np.random.default_rng(0), dense_slots((2, 2, 3, 6))
    slots = replace(slots, step=np.array([0, 4, 8])[slots.step])
    exact = rng.random(len(slots))

    def of(total):
        return [
            Rewards(total, {"one": total}, {"one": 1.0}, {"one": np.ones(len(total), dtype=bool)})
        ]

    options = {
        name: {"rewards": of(exact), "rollout_s": 2.0, "total_s": 3.0, "forwards": 100}
        for name in suffix_fidelity.OPTIONS
    }
    options["one jump"] = {
        "rewards": of(1 - exact),
        "rollout_s": 0.5,
        "total_s": 1.5,
        "forwards": 25,
    }
    options["every 3rd, order 2"] = {
        "rewards": of(np.where(exact > 0.9, np.nan, exact)),
        "rollout_s": 1.0,
        "total_s": 3.0,
        "forwards": 50,
    }
    rows = {
        row["option"]: row
        for row in suffix_fidelity.compare(
            {"slots": slots, "options": options, "advantage": Group()}
        )
    }
    assert (
        rows["exact"]["advantage_rank_correlation"] == pytest.approx(1)
        and rows["exact"]["rollout_speedup"] == 1
    )
    jump = rows["one jump"]
    assert jump["reward_rank_correlation"] == pytest.approx(-1) and jump[
        "advantage_rank_correlation"
    ] == pytest.approx(-1)
    assert (jump["forwards_ratio"], jump["rollout_speedup"], jump["iteration_speedup"]) == (4, 4, 2)
    assert set(jump["by_step"]) == {"0", "4", "8"}
    assert rows["every 3rd, order 2"]["reward_rank_correlation"] == pytest.approx(1), (
        "pictures that failed in either are left out"
    )


# ----------------------------------------------------------------------------------------- learning
def test_curves_meet_where_all_of_them_reach():
    curves = [
        [{"minutes": m, "reward": r} for m, r in points]
        for points in ([(0, 0.4), (4, 0.8)], [(0, 0.5), (2, 0.5), (8, 0.9)])
    ]
    grid, rewards = learning.on_grid(curves, "minutes")
    assert grid[0] == 0 and grid[-1] == 4 and rewards.shape == (2, len(grid))
    assert (
        rewards[0, 0] == 0.4
        and rewards[0, -1] == 0.8
        and rewards[1, -1] == pytest.approx(0.5 + 0.4 / 3)
    )


def test_the_level_is_where_the_baseline_ends_and_ratios_are_of_reaching_it():
    def run(slope, end=9.0):
        minutes = np.arange(0, end + 0.1, 0.1)
        return {
            "curve": [
                {"minutes": m, "forwards": 10 * m, "images": m, "reward": min(slope * m, 0.6)}
                for m in minutes
            ]
        }

    found = learning.level_reached(
        {"fast": [run(0.4)], "never": [run(0.01)], "slow": [run(0.1)]}, "slow"
    )
    assert found["level"] == pytest.approx(0.6) and found["needed"]["fast"][
        "minutes"
    ] == pytest.approx(1.5, abs=0.2)
    assert found["needed"]["slow"]["minutes_times_less"] == 1.0
    assert found["needed"]["fast"]["forwards_times_less"] == pytest.approx(4, rel=0.15)
    assert (
        found["needed"]["never"]["minutes"] is None
        and found["needed"]["never"]["minutes_times_less"] is None
    )


def test_a_curve_counts_a_backward_as_two_forwards(tmp_path):
    rows = [
        {"iteration": 0, "eval/reward": 0.4},
        {
            "iteration": 1,
            "forwards/rollout": 100,
            "forwards/train": 10,
            "images/total": 8,
            "time/elapsed": 60.0,
        },
        {
            "iteration": 2,
            "forwards/rollout": 100,
            "forwards/train": 10,
            "images/total": 16,
            "time/elapsed": 120.0,
            "eval/reward": 0.6,
        },
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, last = learning.curve(tmp_path)
    assert (first["forwards"], first["minutes"], first["reward"]) == (0, 0, 0.4)
    assert (last["forwards"], last["minutes"], last["images"], last["reward"]) == (260, 2, 16, 0.6)


def test_every_variant_is_a_config():
    from tempflow.config import load_config

    for variant, changes in learning.VARIANTS.items():
        config = load_config(learning.ROOT / "configs/tiny_ocr.json", changes)
        assert (config.rollout.plan["type"] == "flow_grpo") == (
            variant in ("flow_grpo", "flow_grpo values", "without branching")
        )


def test_reward_and_drift_are_those_of_the_final_prompts(tmp_path, monkeypatch):
    """Where there are any; scored once, beside the base, whatever number of prompts an evaluation
    of the run takes."""
    summary = {
        "base_reward": 0.4,
        "tuned_reward": 0.7,
        "tuned_stderr": 0.02,
        "gain_stderr": 0.01,
        "drift/color_shift": 9.0,
    }
    (tmp_path / "summary.json").write_text(
        json.dumps(summary | {"minutes": 1.0, "iterations": 1, "device": "CPU", "versions": {}})
    )
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"iteration": 0, "eval/reward": 0.4, "time/elapsed": 0.0}) + "\n"
    )
    asked = []

    def evaluate(run, **more):
        asked.append(more)
        return {
            "base_reward": 0.5,
            "reward": 0.75,
            "stderr": 0.03,
            "gain": 0.25,
            "gain_stderr": 0.015,
            "drift/color_shift": 21.0,
        }

    monkeypatch.setattr(learning.tempflow, "evaluate", evaluate)
    plain = learning.result(tmp_path, 0, None)
    assert (plain["base"], plain["tuned"], plain["tuned_stderr"], plain["gain_stderr"]) == (
        0.4,
        0.7,
        0.02,
        0.01,
    )
    assert plain["drift"] == {"drift/color_shift": 9.0} and not asked
    prompts = tmp_path / "final.txt"
    prompts.write_text("a\nb\n\nc\n")
    for _ in range(2):
        found = learning.result(tmp_path, 0, prompts)
        assert (found["base"], found["tuned"], found["gain"], found["gain_stderr"]) == (
            0.5,
            0.75,
            0.25,
            0.015,
        )
        assert found["drift"] == {"drift/color_shift": 21.0}
    assert asked == [{"prompts": prompts, "count": 3, "compare": True}]


def learning_args(**given):
    return argparse.Namespace(
        **{"variants": ["tempflow"], "variant": [], "set": [], "set_for": [], "final": None} | given
    )


def test_a_variant_may_come_from_the_command_line():
    args = learning_args(
        variants=["own"],
        variant=[["own", "training.objective=nft", "rollout.plan.seeds=2"]],
        set=["training.minutes=4"],
    )
    learning.check(args)
    assert learning.settings(args, "own") == [
        "training.objective=nft",
        "rollout.plan.seeds=2",
        "training.minutes=4",
    ]
    wrong = [
        ({"variants": ["hinges"]}, "hinges"),
        ({"set_for": [("flow_grpo", "a.b=1")]}, "flow_grpo"),
    ]
    for given, named in [*wrong, ({"final": Path("no.txt")}, "no.txt")]:
        with pytest.raises(UserError, match=named):
            learning.check(learning_args(**given))


def test_the_table_has_errors_over_seeds_and_drift():
    def run(tuned, shift):
        return {
            "tuned": tuned,
            "gain": tuned - 0.5,
            "tuned_stderr": 0.03,
            "gain_stderr": 0.02,
            "drift": {"drift/color_shift": shift},
        }

    results = {"two": [run(0.7, 10.0), run(0.8, 20.0)], "one": [run(0.6, 40.0)]}
    two, one = learning.table(
        results, {v: {"minutes": None, "forwards": 12345.0} for v in results}
    ).splitlines()[2:]
    assert (
        two.split(" | ")[1:6] == ["2", "0.750 ± 0.050", "+0.250 ± 0.050", "-", "1.234e+04"]
        and "15.00" in two
    )
    assert "0.600 ± 0.030" in one and "+0.100 ± 0.020" in one and "40.00" in one


def test_no_script_hides_the_package_kernels():
    """A script's folder comes first on sys.path, and this one has a kernels.py, which transformers
    would take for Hugging Face's."""
    loading = [
        file
        for file in (learning.ROOT / "benchmarks").glob("*.py")
        if "quiet_libraries()" in file.read_text()
    ]
    last = "sys.path.append(sys.path.pop(0))"
    lacking = [
        file.name
        for file in loading
        if "__main__" in file.read_text()
        and last not in file.read_text().split("import torch\n")[0]
    ]
    assert len(loading) > 3 and not lacking


# -------------------------------------------------------------------------------------- host's time
def test_thresholds_keep_the_same_weights_whole():
    """And as large a part of all weights is live and fetched ahead."""
    real, narrow = {"weight": 10**6, "bias": 1000}, {"weight": 100, "bias": 10}
    zero = host_seconds.scaled({"stage": 3, "reduce_bucket_size": 1e6}, real, narrow)
    share = 110 / 1_001_000
    assert zero["stage"] == 3 and zero[host_seconds.PERSISTENT] == 10
    assert zero["stage3_max_live_parameters"] == int(1e9 * share)
    assert zero["reduce_bucket_size"] == int(1e6 * share)
    with pytest.raises(AssertionError):
        host_seconds.scaled({}, real, {"weight": 10, "bias": 10})


def test_ratios_of_host_seconds_are_of_medians():
    taken = {
        side: {clock: np.array(seconds) for clock in host_seconds.CLOCKS}
        for side, seconds in (("plain", [1.0, 2.0, 9.0]), ("ZeRO-3", [3.0, 8.0, 4.0]))
    }
    row = host_seconds.summarise("full", taken)
    assert row["ratio"] == dict.fromkeys(host_seconds.CLOCKS, 2.0)
    assert row["ratio_of_rounds"]["thread"] == pytest.approx([3.0, 4 / 9 + 0.4 * 23 / 9, 3.6])
    assert row["seconds"]["plain"]["wall"] == pytest.approx([2.0, 1.4, 6.2])
