"""Small runs that together use every component: each trains two iterations, and then the second
once more from a checkpoint.

As a script of two ranks, with a prepared folder as its argument, it runs the cases of two ranks one
after another.
"""

import json
import shutil
import sys
from pathlib import Path

from pipelines_flux import flux_pipeline
from run_cases import ADAMW, Run, timeless

PROMPT = {"over": "prompt"}
CVAR = {"utility": {"type": "cvar", "over": "batch"}, "scale": "quasi_norm"}
NOVELTY = {"utility": "novelty"}
LORA = {"lora": {"rank": 4, "alpha": 8}}
REWARDS = {
    "left": {"type": "engine_rewards:now_and_then"},
    "red": {"type": "engine_rewards:warmth_by_place", "weight": 0.5},
}
PROMPTS = [
    {"prompt": "a cat", "rewards": ["left"]},
    {"prompt": "a dog", "rewards": ["left", "red"]},
]

# Name (of the objective, unless that names its type): ZeRO stage, whether adapters are trained,
# plan, sde, objective, penalty, and other keys of `training`.
CASES = {
    "grpo": (
        3,
        True,
        {"type": "mix_grpo", "window": 2, "values": True},
        "flow",
        {"ratio": "guard"},
        {"type": "alpha"},
        {"advantage": "turning_point", "weighting": "guard"},
    ),
    "dppo": (
        0,
        False,
        {"type": "tempflow", "seeds": 1, "children": 3},
        "cps",
        {"delta": 1e-9},
        {"type": "jeffreys"},
        {
            "advantage": {"type": "gdpo", "utility": "win_rate", "anchor": 0.1},
            "weighting": {"value": 0.9},
        },
    ),
    "spatial": (
        3,
        True,
        {"type": "tempflow", "seeds": 1, "children": [6, 5, 4]},
        "flow",
        {"type": "grpo"},
        {"type": "channel_kl"},
        {
            "advantage": {"type": "spatial", "blind_to": "color"},
            "merge": {"last": 2, "every": 1, "scale": 1.5},
        },
    ),
    "hinge": (
        0,
        True,
        {"type": "flow_grpo", "values": True},
        "dance",
        {"xi": 1e-7},
        {"type": "hellinger"},
        {"advantage": "dense"},
    ),
    "spo": (
        3,
        False,
        {"type": "mix_grpo", "window": 2, "every": 1, "values": True},
        "precise",
        {},
        {"type": "renyi", "to": "old"},
        {"advantage": "stepwise"},
    ),
    "dpo": (
        0,
        False,
        {"type": "tree", "seeds": 1, "split_steps": [0, 1]},
        "cps",
        {},
        {"type": "tv"},
        {"weighting": "uniform", "advantage": CVAR},
    ),
    "dmpo": (
        3,
        False,
        {"type": "tempflow", "seeds": 1, "children": [4, 3, 2]},
        "precise",
        {},
        {"type": "w2"},
        {"weighting": "guard", "advantage": NOVELTY},
    ),
    "dgpo": (
        0,
        True,
        {"type": "tree", "seeds": 1, "width": 3, "split_steps": [1]},
        "dance",
        {},
        {"type": "chi2", "to": "old"},
        {"weighting": {"value": 0.9}, "advantage": NOVELTY},
    ),
    "fpo": (
        0,
        True,
        {"type": "samples"},
        "flow",
        {"pick": "extremes", "draws": 2},
        {"type": "kl", "form": "v"},
        {"advantage": PROMPT},
    ),
    "awm": (
        3,
        True,
        {"type": "tempflow", "seeds": 1, "children": 2},
        "flow",
        {"draws": 1},
        {"type": "channel_kl"},
        {"advantage": PROMPT},
    ),
    "nft": (3, False, {"type": "flow_grpo"}, "flow", {"draws": 2}, None, {"advantage": PROMPT}),
}
# further keys by case and section: what is no component, and has a state of its own or follows the
# iteration
BESIDE = {
    "dmpo": {
        "data": {"curation": {"prefer": 0.5}},
        "rollout": {"jitter": 0.5, "adapt": {"steps": 2, "noise": {"step": 0.1}}},
    }
}
ON_TWO_RANKS = ["dmpo", "fpo", "spatial"]


def prepare(folder: Path) -> None:
    """A small random model, and prompts whose rewards differ."""
    flux_pipeline(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))


def table_of(name: str, folder: Path) -> dict:
    """The config of a case, its run directory in `folder`. Rewards fail now and then; an iteration
    makes four updates."""
    stage, adapters, plan, sde, objective, penalty, training = CASES[name]
    table = {
        "model": {
            "path": str(folder / "model"),
            "max_sequence_length": 20,
            **(LORA if adapters else {}),
        },
        "data": {"train": str(folder / "prompts.jsonl"), "prompts_per_iteration": 2},
        "rollout": {
            "height": 32,
            "width": 32,
            "num_steps": 4,
            "guidance_scale": 0.0,
            "lanes": 1,
            "micro_batch": 32,
            "plan": plan,
            "sde": sde,
        },
        "rewards": REWARDS,
        "reward_pool": {"workers": 0, "max_failed": 0.9},
        "training": {
            "iterations": 2,
            "micro_batch": 16,
            "updates": {"passes": 2, "parts": 2},
            "objective": {"type": name, **objective},
            "penalty": penalty and {"coef": 0.1, **penalty},
            **training,
        },
        "eval": {"every": 0},
        "checkpoint": {"every": 1, "keep": 9},
        "logging": {"dir": str(folder), "name": name, "tensorboard": False},
        "deepspeed": {"optimizer": ADAMW, "zero_optimization": {"stage": stage}},
    }
    return {
        section: {**keys, **BESIDE.get(name, {}).get(section, {})}
        for section, keys in table.items()
    }


def run(name: str, folder: Path) -> None:
    """Train; set aside what that wrote, and repeat the second iteration from the first one's
    checkpoint (a collective)."""
    import tempflow
    from tempflow.training import distributed

    table = table_of(name, folder)
    tempflow.train(table)
    if distributed.rank() == 0:
        shutil.copytree(folder / name, folder / f"{name}-undisturbed")
        shutil.rmtree(folder / name / "checkpoints/000002")
    distributed.barrier()
    tempflow.train(table, resume=True)


def wrong_with(name: str, folder: Path) -> list[str]:
    """What the resumed run has otherwise than the undisturbed one, and what is missing of a run
    that learned."""
    import torch

    whole, resumed = Run(folder / f"{name}-undisturbed"), Run(folder / name)
    found = (
        []
        if [timeless(row) for row in whole.rows] == [timeless(row) for row in resumed.rows]
        else ["metrics after resuming"]
    )
    before, weights, again = whole.weights(1), whole.weights(2), resumed.weights(2)
    found += [
        f"{key} after resuming" for key in weights if not torch.equal(weights[key], again[key])
    ]
    found += [
        f"{key} is not finite" for key, value in weights.items() if not value.isfinite().all()
    ]
    last = whole.rows[-1]
    found += (
        []
        if any(not torch.equal(weights[key], before[key]) for key in weights)
        and last["grad_norm"] > 0
        else ["nothing was learned"]
    )
    return found + (
        []
        if last["ratio/max_dev"] > 0 and not last["updates/skipped"]
        else ["not all updates were made"]
    )


if __name__ == "__main__":
    from tempflow import cli

    cli.run(lambda: [run(name, Path(sys.argv[-1])) for name in ON_TWO_RANKS] and None)
