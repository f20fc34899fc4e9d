"""Runs of configs/tiny_ocr.json as a GPU trains it, in bf16 and with a reward that costs nothing;
on a CPU the same ones in small.

A whole run of two iterations is compared with a copy of it that lost the second and was resumed.
"""

import json
import math
import shutil

import torch
from engine_cases import ROOT
from run_cases import Run, launch, script_here

BF16 = {
    "model.dtype": "bfloat16",
    "deepspeed.bf16": {"enabled": True},
    "deepspeed.data_types": {"grad_accum_dtype": "fp32"},
    "rewards": {"jpeg": 1.0},
    "training.advantage": "group",  # whose loss is the kernel's
    "training.iterations": 2,
    "checkpoint.every": 1,
    "eval.prompts": 4,
    "logging.tensorboard": False,
}
LORA = BF16 | {
    "model.lora": {"rank": 4, "alpha": 8.0},
    "training.penalty.coef": 0.01,
    "rollout.graphs": True,
    "deepspeed.zero_optimization": {"stage": 1},
}
# ZeRO-3 keeps small weights whole, as all of this model's are, unless told otherwise.
FULL = BF16 | {"deepspeed.zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
FLOAT8 = LORA | {
    "rollout.suffix": {"stride": 2, "exact_steps": 1, "weights": "float8", "audit_every": 1}
}
SMALL = {  # in float32: most CPUs have no fast convolution in bf16
    "model.dtype": "float32",
    "data.prompts_per_iteration": 2,
    "rollout.plan.children": 2,
    "rollout.num_steps": 4,
    "rollout.plan.branch_steps": [0, 2],
    "eval.prompts": 2,
    "reward_pool.workers": 0,
}


def start(folder, name, settings, *more, processes) -> Run:
    """A run to its end, under the launcher with `processes`, or in this process where that is
    None."""
    settings = settings | {"logging.dir": str(folder), "logging.name": name}
    pairs = [
        part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    arguments = ["--config", ROOT / "configs/tiny_ocr.json", *pairs, *more]
    return Run(
        folder / name,
        launch(processes, *arguments) if processes else script_here("train", *arguments),
    )


def whole_and_resumed(folder, settings, processes) -> tuple[Run, Run]:
    """A run, and a copy whose second iteration is lost and made again."""
    whole = start(folder, "whole", settings, processes=processes)
    shutil.copytree(whole.folder, folder / "resumed")
    shutil.rmtree(folder / "resumed/checkpoints/000002")
    return whole, start(folder, "resumed", settings, "--resume", processes=processes)


def moved(run: Run, first: int, last: int) -> torch.Tensor:
    """What the trained weights moved by between two checkpoints, in one row."""
    before, after = run.weights(first), run.weights(last)
    return torch.cat(
        [(after[name].double() - before[name].double()).flatten() for name in sorted(after)]
    )


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one, other, dim=0).item()


def check_trained(run: Run, device: str) -> None:
    """Two iterations that moved the weights, with finite metrics, on the device named."""
    assert [row["iteration"] for row in run.rows] == [0, 1, 2] and run.checkpoints == [1, 2]
    assert json.loads((run.folder / "summary.json").read_text())["device"] == device
    for row in run.rows[1:]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert (
            row["grad_norm"] > 0
            and row["reward/std"] > 0
            and row["reward/failed"] == 0
            and row["updates/skipped"] == 0
        )
        # Rollout and training differ by bf16's rounding of velocities, which a mean over elements
        # makes small.
        assert row["mismatch/log_prob"] < 2e-3
    assert moved(run, 1, 2).norm() > 0
    assert run.rows[0]["eval/reward"] != run.rows[2]["eval/reward"]


def check_resumed(whole: Run, resumed: Run) -> None:
    """The second iteration again: the same samples and, to bf16's rounding and the order of a GPU's
    sums, the same update."""
    check_trained(resumed, json.loads((whole.folder / "summary.json").read_text())["device"])
    a, b = whole.rows[2], resumed.rows[2]
    assert {key: a[key] for key in ("images", "images/total", "forwards/rollout", "lr")} == {
        key: b[key] for key in ("images", "images/total", "forwards/rollout", "lr")
    }
    assert abs(a["reward/mean"] - b["reward/mean"]) <= 0.02 * abs(a["reward/mean"])
    assert cosine(moved(whole, 1, 2), moved(resumed, 1, 2)) > 0.95
