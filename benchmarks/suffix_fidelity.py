"""Measures what a coarser suffix saves and costs: the speed of the rollout, and how well its
rewards agree with those of the exact suffix.

    python benchmarks/suffix_fidelity.py [--config FILE] [--iterations N] [--set section.key=value
    ...]

In every iteration, each option runs the same plan from the same noise as the exact suffix. It
prints, and writes to benchmarks/results/, the forwards and seconds that are saved, and the rank
correlation of the rewards and of the advantages, which training uses; also by branch step. The plot
shows correlation against savings. The row of the exact suffix in batches of two thirds the size
shows the effect of rounding alone on the ranks; no option can be expected to agree better. Float8
is slow on hardware that cannot multiply it, such as CPUs; only its agreement is meaningful there.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    # This folder goes to the end of the path: its kernels.py would be imported in place of
    # Hugging Face's package `kernels`.
    sys.path.append(sys.path.pop(0))

import numpy as np
import torch
from bench import changed
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tempflow import cli
from tempflow.advantages import rank_correlation
from tempflow.config import Config, Suffix, load_config
from tempflow.data.prompts import PromptOrder, load_prompts
from tempflow.rewards import check_prompts, parse_rewards
from tempflow.run.environment import device_name, versions
from tempflow.run.logs import write_atomic

ROOT = Path(__file__).parent.parent
REGROUPED = "exact, in other batches"
FLOAT8 = "every step, float8"
OPTIONS: dict[str, Suffix | None] = {
    "exact": None,
    REGROUPED: None,
    "every 2nd, order 2": Suffix(stride=2, order=2),
    "every 2nd, order 1": Suffix(stride=2, order=1),
    "1 exact, every 2nd, order 2": Suffix(stride=2, order=2, exact_steps=1),
    "2 exact, every 2nd, order 2": Suffix(stride=2, order=2, exact_steps=2),
    "every 3rd, order 2": Suffix(stride=3, order=2),
    "1 exact, every 3rd, order 2": Suffix(stride=3, order=2, exact_steps=1),
    "2 exact, every 3rd, order 2": Suffix(stride=3, order=2, exact_steps=2),
    "1 exact, every 4th, order 2": Suffix(stride=4, order=2, exact_steps=1),
    "one jump": Suffix(stride=64, order=1),
    FLOAT8: Suffix(stride=1, order=1, weights="float8"),
    "2 exact, every step, float8": Suffix(stride=1, order=1, exact_steps=2, weights="float8"),
    "2 exact, every 2nd, order 2, float8": Suffix(
        stride=2, order=2, exact_steps=2, weights="float8"
    ),
}


def open_session(config: Config):
    """A session on the config's model, prompts and rewards, without a training engine."""
    cli.quiet_libraries()
    from tempflow.models import check_model
    from tempflow.training.session import build

    specs = parse_rewards(config.rewards)
    prompts = load_prompts(config.data.train, "data.train")
    check_prompts(specs, [p.text for p in prompts], [p.for_rewards for p in prompts])
    check_model(config.model.path)
    session = build(config, prompts, [], specs, train=False)
    session.pool.wait_ready()
    return session


def possible(transformer: torch.nn.Module) -> list[str]:
    """The names of the options that this machine can run."""
    from tempflow.sampling.float8 import obstacle

    reason = obstacle(transformer)
    if reason:
        print(f"float8 is left out: {reason}")
    return [
        name
        for name, suffix in OPTIONS.items()
        if not (reason and suffix and suffix.weights == "float8")
    ]


def measure(config: Config, iterations: int) -> dict:
    """The rewards and the cost of every option, and one session with which to compute
    advantages."""
    from tempflow.training.rollout import gather_rewards, plan_iteration, roll_out

    session = open_session(config)
    order = PromptOrder(
        len(session.prompts), config.data.prompts_per_iteration, config.training.seed
    )
    regrouped = session.variant(
        changed(config, rollout={"micro_batch": -(-config.rollout.rows * 2 // 3)})
    )
    options = possible(session.policy.denoiser())
    sessions = {name: regrouped if name == REGROUPED else session for name in options}
    for name in options:
        if OPTIONS[name] and OPTIONS[name].weights == "float8":
            sessions[name] = session.variant(changed(config, rollout={"suffix": OPTIONS[name]}))
    seen = {
        name: {"rewards": [], "rollout_s": 0.0, "total_s": 0.0, "forwards": 0} for name in options
    }

    def run(iteration: int, name: str):
        layout = plan_iteration(session, order.indices(iteration), iteration)
        rolled = roll_out(sessions[name], layout, iteration, OPTIONS[name])
        return rolled, gather_rewards(sessions[name], rolled)

    with session.pool, session.threads.shared():
        slots = run(0, "one jump")[0].layout.slots  # warms up
        if FLOAT8 in options:
            run(0, FLOAT8)
        for iteration, name in track(
            [(i, name) for i in range(iterations) for name in options], description="rollouts"
        ):
            (rolled, scored), one = run(iteration, name), seen[name]
            one["rewards"].append(scored.rewards)
            one["rollout_s"] += rolled.seconds["rollout"]
            one["total_s"] += (
                rolled.seconds["rollout"] + rolled.seconds["decode"] + scored.seconds["reward"]
            )
            one["forwards"] += rolled.stats.forwards
    return {"slots": slots, "options": seen, "advantage": session.advantage}


def compare(seen: dict) -> list[dict]:
    """One row for each option: ratios to the exact suffix, and rank correlations with it."""
    slots, exact = seen["slots"], seen["options"]["exact"]
    rows = []
    for name, one in seen["options"].items():
        pairs = list(zip(one["rewards"], exact["rewards"], strict=True))
        values = [[seen["advantage"](slots, rewards) for rewards in pair] for pair in pairs]
        valid = [a.valid & b.valid for a, b in values]

        def correlate(kept, of=values, masks=valid):
            """Spearman's rho of the advantages of the kept slots."""
            both = [
                np.concatenate([v[i].values[kept & m] for v, m in zip(of, masks)]) for i in (0, 1)
            ]
            return rank_correlation(*both)

        rewards = [np.concatenate([p[i].total[m] for p, m in zip(pairs, valid)]) for i in (0, 1)]
        rows.append(
            {
                "option": name,
                "suffix": OPTIONS[name].model_dump() if OPTIONS[name] else None,
                "forwards_ratio": exact["forwards"] / one["forwards"],
                "rollout_speedup": exact["rollout_s"] / one["rollout_s"],
                "iteration_speedup": exact["total_s"] / one["total_s"],
                "rollout_s": one["rollout_s"],
                "reward_mean": float(np.nanmean(np.stack([r.total for r in one["rewards"]]))),
                "reward_rank_correlation": rank_correlation(*rewards),
                "advantage_rank_correlation": correlate(np.ones(len(slots), dtype=bool)),
                "by_step": {str(step): correlate(slots.step == step) for step in slots.steps()},
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    table = Table(title="suffixes against the exact one")
    for column in (
        "suffix",
        "forwards",
        "rollout",
        "rollout + decode + reward",
        "reward rho",
        "advantage rho",
    ):
        table.add_column(column, justify="left" if column == "suffix" else "right")
    for row in rows:
        table.add_row(
            row["option"],
            f"{row['forwards_ratio']:.2f}x",
            f"{row['rollout_speedup']:.2f}x",
            f"{row['iteration_speedup']:.2f}x",
            f"{row['reward_rank_correlation']:.3f}",
            f"{row['advantage_rank_correlation']:.3f}",
        )
    Console().print(table)


def draw(rows: list[dict], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for number, row in enumerate(rows):
        place = row["rollout_speedup"], row["advantage_rank_correlation"]
        axes.plot(*place, "o", color=f"C{number % 10}", label=f"{number}: {row['option']}")
        axes.annotate(str(number), place, textcoords="offset points", xytext=(5, 3), fontsize=8)
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="rollout, times faster than exact",
        ylabel="rank correlation of advantages",
        title=title,
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs/tiny_ocr.json"))
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the report"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    rows = compare(measure(config, args.iterations))
    show(rows)
    out = args.output / f"suffix-{Path(args.config).stem}-{date.today()}.json"
    record = {
        "date": str(date.today()),
        "command": sys.argv,
        "device": device_name(),
        "versions": versions(),
        "config": config.model_dump(),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(record, indent=1))
    draw(
        rows, out.with_suffix(".png"), f"{Path(args.config).stem}, {device_name()}, {date.today()}"
    )
    print(out)
    return 0


if __name__ == "__main__":
    cli.run(main)
