"""Who learns faster, whatever the seed? Trains variants of a config and records their held-out curves.

    python benchmarks/learning.py --seeds 5 --variants tempflow            # does the shipped run learn
    python benchmarks/learning.py --seeds 3 --set training.minutes=8       # TempFlow-GRPO against the others

Every run starts from the same weights, has the same minutes of training and goes through the deepspeed launcher, as a user's
would; one after another, because each needs the whole machine. Runs found complete in --runs are not repeated. Written to
benchmarks/results/: JSON, and the curves' mean and range over the seeds against minutes, transformer forwards (a
backward counts two) and rewarded pictures; and what each needs to get to where the last variant ends up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np

from tempflow import cli
from tempflow.config import load_config
from tempflow.errors import UserError
from tempflow.run.logs import read_metrics, write_atomic

ROOT = Path(__file__).parent.parent
UNIFORM = ["training.weighting=uniform"]
PATHS = [
    "rollout.plan=flow_grpo",
    "rollout.plan.seeds=12",
    "training.advantage.over=prompt",
    "training.updates.passes=1",
]
VARIANTS = {
    "tempflow": [],
    "flow_grpo": [*PATHS, *UNIFORM],
    "without branching": PATHS,
    "uniform weights": UNIFORM,
    "prompt groups": ["training.advantage.over=prompt"],
    "one update": ["training.updates.passes=1"],
    "suffix every 2nd": ["rollout.suffix={}"],
    "exact suffix": ["rollout.suffix=null"],
}
AXES = {"minutes": "minutes of training", "forwards": "transformer forwards (backward = 2)", "images": "rewarded pictures"}
POINTS = 60


def settings(args: argparse.Namespace, variant: str) -> list[str]:
    """What makes a variant of the config, and what the command line says of all or of this one."""
    return [*VARIANTS[variant], *args.set, *(override for name, override in args.set_for if name == variant)]


def train(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Train one seed of a variant unless its run is complete; returns the run directory."""
    name = f"{Path(args.config).stem}-{variant.replace(' ', '_')}-seed{seed}"
    run_dir = args.runs / name
    if (run_dir / "summary.json").exists():
        return run_dir
    overrides = [*settings(args, variant), f"training.seed={seed}", f"logging.name={name}", f"logging.dir={args.runs}"]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "engine/train.py", "--config", args.config]
    command += [part for override in overrides for part in ("--set", override)]
    if run_dir.exists():
        command.append("--resume")
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise UserError(f"{name}: the run ended with status {done.returncode}")
    return run_dir


def curve(run_dir: Path) -> list[dict]:
    """Held-out reward against training minutes, rewarded pictures and transformer forwards."""
    points, forwards = [], 0
    for row in read_metrics(run_dir):
        forwards += row.get("forwards/rollout", 0) + 3 * row.get("forwards/train", 0)
        if row.get("eval/reward") is not None:
            points.append(
                {
                    "iteration": row["iteration"],
                    "minutes": row.get("time/elapsed", 0.0) / 60,
                    "images": row.get("images/total", 0),
                    "forwards": forwards,
                    "reward": row["eval/reward"],
                }
            )
    return points


def on_grid(curves: list[list[dict]], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Places [n] that all curves reach, and their rewards there, interpolated, [seeds, n]."""
    end = min(points[-1][axis] for points in curves)
    grid = np.linspace(0, end, POINTS)
    return grid, np.stack([np.interp(grid, [p[axis] for p in points], [p["reward"] for p in points]) for points in curves])


def level_reached(results: dict[str, list[dict]], baseline: str) -> dict:
    """What every variant's mean curve needs to get to where the baseline ends up, and how many times less that is.

    The level: the mean of the baseline's curve over the last third of its minutes. None where a variant never reaches it.
    """
    grid, rewards = on_grid([run["curve"] for run in results[baseline]], "minutes")
    level = float(rewards.mean(0)[grid >= grid[-1] * 2 / 3].mean())
    needed: dict[str, dict] = {variant: {} for variant in results}
    for axis in AXES:
        for variant, runs in results.items():
            grid, rewards = on_grid([run["curve"] for run in runs], axis)
            there = np.flatnonzero(rewards.mean(0) >= level)
            needed[variant][axis] = float(grid[there[0]]) if len(there) else None
        for variant in results:
            mine, its = needed[variant][axis], needed[baseline][axis]
            needed[variant][f"{axis}_times_less"] = its / mine if mine and its else None
    return {"baseline": baseline, "level": level, "needed": needed}


def draw(results: dict[str, list[dict]], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(1, len(AXES), figsize=(5 * len(AXES), 4), layout="constrained", sharey=True)
    for place, (axis, label) in zip(axes, AXES.items(), strict=True):
        for number, (variant, runs) in enumerate(results.items()):
            grid, rewards = on_grid([run["curve"] for run in runs], axis)
            place.plot(grid, rewards.mean(0), color=f"C{number}", label=f"{variant} ({len(runs)} seeds)")
            place.fill_between(grid, rewards.min(0), rewards.max(0), color=f"C{number}", alpha=0.15, linewidth=0)
        place.set(xlabel=label)
        place.xaxis.set_major_formatter(EngFormatter(sep=""))
        place.grid(alpha=0.3)
    axes[0].set(ylabel="held-out reward: mean and range")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def result(run_dir: Path, seed: int) -> dict:
    summary = json.loads((run_dir / "summary.json").read_text())
    gain = summary["tuned_reward"] - summary["base_reward"]
    return {
        "seed": seed,
        "base": summary["base_reward"],
        "tuned": summary["tuned_reward"],
        "gain": gain,
        "minutes": summary["minutes"],
        "iterations": summary["iterations"],
        "device": summary["device"],
        "versions": summary["versions"],
        "curve": curve(run_dir),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/tiny_ocr.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["tempflow", "flow_grpo"],
        help="what is compared; the last is what the others are measured against",
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--set-for",
        nargs=2,
        action="append",
        default=[],
        metavar=("VARIANT", "SECTION.KEY=VALUE"),
        help="a setting of one variant, such as a learning rate that suits it",
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/learning", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the report")
    args = parser.parse_args()
    unknown = {name for name, _ in args.set_for} - set(args.variants)
    if unknown:
        raise UserError(f"--set-for: {', '.join(unknown)} is not among --variants: {', '.join(args.variants)}")
    configs = {variant: load_config(args.config, settings(args, variant)).model_dump() for variant in args.variants}
    results: dict[str, list[dict]] = {variant: [] for variant in args.variants}
    for seed in range(args.seeds):
        for variant in args.variants:
            one = result(train(args, variant, seed), seed)
            results[variant].append(one)
            print(
                f"{variant}, seed {seed}: {one['base']:.3f} -> {one['tuned']:.3f} ({one['gain']:+.3f}) in {one['minutes']:.1f} min",
                flush=True,
            )
    out = args.output / f"learning-{Path(args.config).stem}-{'-'.join(args.variants).replace(' ', '_')}-{date.today()}.json"
    device = results[args.variants[0]][0]["device"]
    levels = level_reached(results, args.variants[-1])
    record = {"date": str(date.today()), "command": sys.argv, "device": device, "configs": configs, "results": results, "level": levels}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(record, indent=1))
    draw(results, out.with_suffix(".png"), f"{Path(args.config).stem}, {device}, {date.today()}")
    for variant, runs in results.items():
        gains = [run["gain"] for run in runs]
        print(f"{variant}: gain {min(gains):+.3f} to {max(gains):+.3f}, {sum(g >= 0.3 for g in gains)} of {len(gains)} at least +0.30")
    for variant, cost in levels["needed"].items():
        parts = [f"{cost[axis]:.4g} {axis} ({cost[f'{axis}_times_less'] or 0:.2f} times less)" for axis in AXES if cost[axis] is not None]
        print(f"to {levels['level']:.3f}, where {levels['baseline']} ends up, {variant} needs: {', '.join(parts) or 'more than it had'}")
    print(out)
    return 0


if __name__ == "__main__":
    cli.run(main)
