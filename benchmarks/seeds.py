"""Does the shipped run learn, whatever the seed? Trains a config once per seed and records the held-out curves.

    python benchmarks/seeds.py --config configs/tiny_ocr.json --seeds 5 [--set section.key=value ...]

Runs one after another (they need the whole machine), each through the deepspeed launcher, as a user would. Writes
benchmarks/results/seeds-DATE.json and a PNG of the curves; runs that are complete in --runs already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from tempflow.config import load_config
from tempflow.logs import read_metrics, write_atomic

ROOT = Path(__file__).parent.parent


def train(args: argparse.Namespace, seed: int) -> Path:
    """Train one seed unless its run is complete; returns the run directory."""
    name = f"{Path(args.config).stem}-seed{seed}"
    run_dir = args.runs / name
    if (run_dir / "summary.json").exists():
        return run_dir
    overrides = [f"training.seed={seed}", f"logging.name={name}", f"logging.dir={args.runs}", *args.set]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "engine/train.py", "--config", args.config]
    command += [part for override in overrides for part in ("--set", override)]
    if run_dir.exists():
        command.append("--resume")
    subprocess.run(command, cwd=ROOT, check=True)
    return run_dir


def curve(run_dir: Path) -> list[dict]:
    """Held-out reward against training minutes, images and transformer forwards (a backward counts two)."""
    points, forwards = [], 0
    for row in read_metrics(run_dir):
        forwards += row.get("forwards/rollout", 0) + 3 * row.get("forwards/train", 0)
        if row.get("eval/reward") is not None:
            points.append({
                "iteration": row["iteration"], "minutes": row.get("time/elapsed", 0.0) / 60,
                "images": row.get("images/total", 0), "forwards": forwards, "reward": row["eval/reward"],
            })  # fmt: skip
    return points


def draw(curves: dict[int, list[dict]], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for seed, points in curves.items():
        axes.plot([p["minutes"] for p in points], [p["reward"] for p in points], marker=".", label=f"seed {seed}")
    axes.set(xlabel="minutes of training", ylabel="held-out reward", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/tiny_ocr.json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    results, curves = [], {}
    for seed in range(args.seeds):
        run_dir = train(args, seed)
        summary = json.loads((ROOT / run_dir / "summary.json").read_text())
        curves[seed] = curve(ROOT / run_dir)
        gain = summary["tuned_reward"] - summary["base_reward"]
        results.append({"seed": seed, "base": summary["base_reward"], "tuned": summary["tuned_reward"], "gain": gain,
                        "minutes": summary["minutes"], "curve": curves[seed]})  # fmt: skip
        print(f"seed {seed}: {summary['base_reward']:.3f} -> {summary['tuned_reward']:.3f} ({gain:+.3f}) "
              f"in {summary['minutes']:.1f} min", flush=True)  # fmt: skip
    out = ROOT / "benchmarks/results" / f"seeds-{Path(args.config).stem}-{date.today()}.json"
    record = {"date": str(date.today()), "command": sys.argv, "device": summary["device"], "versions": summary["versions"],
              "config": config.model_dump(), "seeds": results}  # fmt: skip
    write_atomic(out, json.dumps(record, indent=1))
    draw(curves, out.with_suffix(".png"), f"{Path(args.config).stem}, {summary['device']}, {date.today()}")
    print(f"{sum(r['gain'] >= 0.3 for r in results)} of {len(results)} seeds gain at least 0.30; {out}")


if __name__ == "__main__":
    main()
