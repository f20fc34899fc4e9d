"""Compares how fast variants of a config learn, over seeds, and how far their images drift; records
their held-out curves.

    # does the shipped config learn?
    python benchmarks/learning.py --seeds 5 --variants tempflow
    # TempFlow-GRPO against Flow-GRPO
    python benchmarks/learning.py --seeds 3 --set training.minutes=8
    python benchmarks/learning.py --variants hinge flow_grpo \\
        --variant hinge training.objective=hinge training.updates.passes=4

Every run starts from the same weights, has the same minutes of training, and goes through the
deepspeed launcher as a user's run does. Runs follow one another, because each needs the whole
machine: all seeds of a variant, then the next variant. Complete runs in --runs are not repeated.
With --final, the model of each run is scored once more at its end, on prompts by which no setting
was chosen.

The results are written to benchmarks/results/: JSON, a table (final reward with its error, the cost
of reaching the level at which the last variant ends, drift from the base), and the mean and range
of the curves over seeds, against minutes, transformer forwards (a backward counts as two) and
rewarded images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np

import tempflow
from tempflow import cli
from tempflow.config import load_config
from tempflow.errors import UserError
from tempflow.run.logs import read_metrics, write_atomic
from tempflow.run.means import with_error

ROOT = Path(__file__).parent.parent
UNIFORM = ["training.weighting=uniform"]
ON_PATHS = ["rollout.plan=flow_grpo", "training.updates.passes=1", "training.penalty=null"]
PATHS = [
    *ON_PATHS,
    "rollout.plan.seeds=12",
    'training.advantage={"type": "group", "over": "prompt"}',
]
VARIANTS = {
    "tempflow": [],
    "all steps": ["rollout.plan.branch_steps=all"],
    "no penalty": ["training.penalty=null"],
    "flow_grpo": [*PATHS, *UNIFORM],
    # Half the paths, because each has an image for each of its steps beside its own.
    "flow_grpo values": [
        *ON_PATHS,
        "rollout.plan.seeds=6",
        "rollout.plan.values=true",
        'training.advantage={"type": "dense", "over": "prompt"}',
        *UNIFORM,
    ],
    "without branching": PATHS,
    "uniform weights": UNIFORM,
    "whole images": ["training.advantage=group"],
    "prompt groups": ["training.advantage.over=prompt"],
    "one update": ["training.updates.passes=1"],
    "suffix every 2nd": ["rollout.suffix={}"],
    "exact suffix": ["rollout.suffix=null"],
}
AXES = {
    "minutes": "minutes of training",
    "forwards": "transformer forwards (backward = 2)",
    "images": "rewarded images",
}
DRIFT = ("drift/color_shift", "drift/color_spread", "drift/diversity")
POINTS = 60


def settings(args: argparse.Namespace, variant: str) -> list[str]:
    """The settings that make a variant of the config: its own, and those of the command line for
    all variants or for this one."""
    own = {name: changes for name, *changes in args.variant}
    return [
        *own.get(variant, VARIANTS.get(variant, [])),
        *args.set,
        *(override for name, override in args.set_for if name == variant),
    ]


def train(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Train one seed of a variant, unless its run is complete. Returns the run directory."""
    name = f"{Path(args.config).stem}-{variant.replace(' ', '_')}-seed{seed}"
    run_dir = args.runs / name
    if (run_dir / "summary.json").exists():
        return run_dir
    overrides = [
        *settings(args, variant),
        f"training.seed={seed}",
        f"logging.name={name}",
        f"logging.dir={args.runs}",
    ]
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
    """Held-out reward and drift against training minutes, rewarded images and transformer
    forwards."""
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
                    "stderr": row.get("eval/reward/stderr"),
                    **{key: row[key] for key in DRIFT if row.get(key) is not None},
                }
            )
    return points


def on_grid(curves: list[list[dict]], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions [n] that all curves reach, and their interpolated rewards there, [seeds, n]."""
    end = min(points[-1][axis] for points in curves)
    grid = np.linspace(0, end, POINTS)
    return grid, np.stack(
        [
            np.interp(grid, [p[axis] for p in points], [p["reward"] for p in points])
            for points in curves
        ]
    )


def level_reached(results: dict[str, list[dict]], baseline: str) -> dict:
    """What the mean curve of every variant needs to reach the level at which the baseline ends, and
    how many times less than the baseline that is.

    The level is the mean of the baseline's curve over the last third of its minutes. None for a
    variant that never reaches it.
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

    figure, axes = plt.subplots(
        1, len(AXES), figsize=(5 * len(AXES), 4), layout="constrained", sharey=True
    )
    for place, (axis, label) in zip(axes, AXES.items(), strict=True):
        for number, (variant, runs) in enumerate(results.items()):
            grid, rewards = on_grid([run["curve"] for run in runs], axis)
            place.plot(
                grid, rewards.mean(0), color=f"C{number}", label=f"{variant} ({len(runs)} seeds)"
            )
            place.fill_between(
                grid, rewards.min(0), rewards.max(0), color=f"C{number}", alpha=0.15, linewidth=0
            )
        place.set(xlabel=label)
        place.xaxis.set_major_formatter(EngFormatter(sep=""))
        place.grid(alpha=0.3)
    axes[0].set(ylabel="held-out reward: mean and range")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def table(results: dict[str, list[dict]], needed: dict) -> str:
    """A Markdown table with a row for each variant. Errors are of the mean over seeds, or over
    prompts if there is one seed."""
    lines = [
        "| variant | seeds | reward | gain | minutes to level | forwards to level | color shift |"
        " color spread | diversity |"
    ]
    lines.append("|---" * 9 + "|")
    for variant, runs in results.items():
        cells = [variant, str(len(runs)), mean_text(runs, "tuned"), mean_text(runs, "gain", "+")]
        cells += [
            "-" if needed[variant][axis] is None else f"{needed[variant][axis]:.4g}"
            for axis in ("minutes", "forwards")
        ]
        for key in DRIFT:
            known = [run["drift"][key] for run in runs if key in run["drift"]]
            cells.append(f"{np.mean(known):.2f}" if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_text(runs: list[dict], key: str, sign: str = "") -> str:
    """The mean of a result over seeds with its standard error; for one seed, with the error over
    prompts."""
    values = [run[key] for run in runs]
    error = (
        np.std(values, ddof=1) / len(values) ** 0.5
        if len(values) > 1
        else runs[0].get(f"{key}_stderr")
    )
    return with_error(float(np.mean(values)), None if error is None else float(error), sign)


def final(run_dir: Path, prompts: Path) -> dict:
    """What `tempflow.evaluate` reports about the end of a run and its base, on prompts that it was
    not evaluated on before."""
    file = run_dir / f"compared-{prompts.stem}.json"
    if not file.exists():
        count = sum(1 for line in prompts.open(encoding="utf-8") if line.strip())
        write_atomic(
            file, json.dumps(tempflow.evaluate(run_dir, prompts=prompts, count=count, compare=True))
        )
    return json.loads(file.read_text())


def result(run_dir: Path, seed: int, prompts: Path | None) -> dict:
    summary = json.loads((run_dir / "summary.json").read_text())
    points = curve(run_dir)
    scored = (
        final(run_dir, prompts)
        if prompts
        else summary | {"reward": summary["tuned_reward"], "stderr": summary.get("tuned_stderr")}
    )
    return {
        "seed": seed,
        "base": scored["base_reward"],
        "tuned": scored["reward"],
        "tuned_stderr": scored["stderr"],
        "gain": scored["reward"] - scored["base_reward"],
        "gain_stderr": scored.get("gain_stderr"),
        "drift": {key: scored[key] for key in DRIFT if key in scored},
        "minutes": summary["minutes"],
        "iterations": summary["iterations"],
        "device": summary["device"],
        "versions": summary["versions"],
        "curve": points,
    }


def check(args: argparse.Namespace) -> None:
    """UserError for a variant that is not defined, and for prompts that do not exist."""
    known = {*VARIANTS, *(name for name, *_ in args.variant)}
    of_no_variant = {name for name, _ in args.set_for} - set(args.variants)
    for option, names, allowed in (
        ("--variants", set(args.variants) - known, known),
        ("--set-for", of_no_variant, set(args.variants)),
    ):
        if names:
            raise UserError(
                f"{option}: {', '.join(sorted(names))} is not one of {', '.join(sorted(allowed))}"
            )
    if args.final and not args.final.is_file():
        raise UserError(f"--final: no such file: {args.final}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="configs/tiny_ocr.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["tempflow", "flow_grpo"],
        help=(
            "what is compared; the last is what the others are measured against. Known:"
            f" {', '.join(VARIANTS)}, and those of --variant"
        ),
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "SECTION.KEY=VALUE"),
        help="another variant: its name, and what it sets of the config",
    )
    parser.add_argument(
        "--final",
        type=Path,
        help="prompt file that every run's model is scored on at its end, all of its prompts",
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
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/learning", help="folder of the runs"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the report"
    )
    args = parser.parse_args()
    check(args)
    return args


def main() -> int:
    args = parse_arguments()
    configs = {
        variant: load_config(args.config, settings(args, variant)).model_dump()
        for variant in args.variants
    }
    results: dict[str, list[dict]] = {variant: [] for variant in args.variants}
    for variant in args.variants:
        for seed in range(args.seeds):
            one = result(train(args, variant, seed), seed, args.final)
            results[variant].append(one)
            print(
                f"{variant}, seed {seed}: {one['base']:.3f} -> {one['tuned']:.3f}"
                f" ({one['gain']:+.3f}) in {one['minutes']:.1f} min",
                flush=True,
            )
    variants = "-".join(args.variants).replace(" ", "_")
    out = args.output / f"learning-{Path(args.config).stem}-{variants}-{date.today()}.json"
    device = results[args.variants[0]][0]["device"]
    levels = level_reached(results, args.variants[-1])
    record = {
        "date": str(date.today()),
        "command": sys.argv,
        "device": device,
        "configs": configs,
        "results": results,
        "level": levels,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(record, indent=1))
    written = table(results, levels["needed"])
    write_atomic(out.with_suffix(".md"), written)
    print(written)
    draw(results, out.with_suffix(".png"), f"{Path(args.config).stem}, {device}, {date.today()}")
    _print_summary(results, levels)
    print(out)
    return 0


def _print_summary(results: dict[str, list[dict]], levels: dict) -> None:
    """Print the gains of each variant, and what each needs to reach the baseline's level."""
    for variant, runs in results.items():
        gains = [run["gain"] for run in runs]
        print(
            f"{variant}: gain {min(gains):+.3f} to {max(gains):+.3f},"
            f" {sum(g >= 0.3 for g in gains)} of {len(gains)} at least +0.30"
        )
    for variant, cost in levels["needed"].items():
        parts = [
            f"{cost[axis]:.4g} {axis} ({cost[f'{axis}_times_less'] or 0:.2f} times less)"
            for axis in AXES
            if cost[axis] is not None
        ]
        print(
            f"to {levels['level']:.3f}, where {levels['baseline']} ends up, {variant} needs:"
            f" {', '.join(parts) or 'more than it had'}"
        )


if __name__ == "__main__":
    cli.run(main)
