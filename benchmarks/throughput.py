"""Measures whole iterations side by side: of the paper's procedure, of Flow-GRPO, and of this
engine with each of its optimizations off and on.

    python benchmarks/throughput.py [--quick] [--config FILE] [--rounds N] [--only NAME ...] [--set
    section.key=value ...]

Without --config, on a CPU it runs the shipped model at the paper's proportions (T = 10, 4 seeds, 6
children, 9 branch steps, 2 prompts, KL on). On a GPU of 80 GB it runs FLUX.1-dev's shape with
random weights (benchmarks/make_pipeline.py), LoRA, at 512 and 1024 pixels, with three branch steps
and one prompt, so that a round takes minutes. It says beforehand how long it will take, and refuses
what does not fit the GPU.

In every round, every variant makes one whole iteration on the same prompts: rollout, decoding,
reward, updates; in its last round it then frees its memory. It prints, and writes to
benchmarks/results/ with a bar chart, the seconds of every phase (medians over the rounds), images
per second, transformer forwards, and the ratio to the paper's procedure. The JSON is written after
every iteration. Model FLOPs are compared with a matrix product of the same dtype that is measured
in the same run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Callable, Iterator

if __name__ == "__main__":
    # This folder goes to the end of the path: its kernels.py would be imported in place of
    # Hugging Face's package `kernels`.
    sys.path.append(sys.path.pop(0))

import numpy as np
import torch
from bench import PHASES, Bench, EachChild, Engine, Iteration, changed, matmul_peak, release
from forecast import SPARE, forecast
from make_pipeline import make_pipeline
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sequential import Sequential
from torch.utils.flop_counter import FlopCounterMode

from tempflow import cli
from tempflow.config import Config, Suffix, load_config
from tempflow.errors import UserError
from tempflow.run.environment import device_name, uses_gpu, versions
from tempflow.run.logs import write_atomic

ROOT = Path(__file__).parent.parent
CARD = ROOT / "configs/models/flux-dev"
SHIPPED = [
    "data.prompts_per_iteration=2",
    "rollout.plan.seeds=4",
    "rollout.plan.children=6",
    "rollout.plan.branch_steps=all",
    "rollout.suffix=null",
    'training.penalty={"type":"kl","coef":0.004}',
    "training.updates.passes=1",
    "training.ema=null",
    "training.merge=null",
    "training.minutes=null",
    "eval.every=0",
]
LARGE = [
    "data.prompts_per_iteration=1",
    "rollout.plan.seeds=1",
    "rollout.plan.children=6",
    "rollout.plan.branch_steps=[0,4,8]",
    'rewards={"jpeg": 1.0}',
    "eval.every=0",
    "training.ema=null",
    "training.updates.passes=1",
    "rollout.micro_batch=6",
    "rollout.graphs=false",
]
QUICK = ["data.prompts_per_iteration=1", "rollout.plan.seeds=1"]
PIPELINE_BYTES = 34e9  # of the random FLUX.1-dev pipeline on disk


# ----------------------------------------------------------------------------------------- variants
@dataclass(frozen=True)
class Variant:
    """One way to make an iteration. kind: Sequential or Engine; compiled: whether it runs on an
    engine of its own with compiled blocks."""

    name: str
    config: Config
    kind: type = Engine
    compiled: bool = False


def variants(config: Config, compiled: bool, gpu: bool) -> list[Variant]:
    """The variants to compare: the paper's procedure, Flow-GRPO with as many rewarded images, and
    the engine with its optimizations one by one."""
    plan, float8 = config.rollout.plan, {"suffix": Suffix(weights="float8")}
    if not isinstance(plan["children"], int):
        raise UserError(
            f"rollout.plan.children: {plan['children']}; the paper's procedure has one number for"
            " all steps"
        )
    images = plan["seeds"] * len(config.plan().steps(0)) * plan["children"]
    flow = changed(
        config,
        rollout={"plan": {"type": "flow_grpo", "seeds": images}},
        training={"advantage": config.training.advantage | {"over": "prompt"}},
    )
    found = [
        Variant("paper's procedure", config, Sequential),
        Variant("Flow-GRPO, as many images", flow),
        Variant("engine, one forward per child", config, EachChild),
        Variant("engine", config),
        Variant("engine, suffix every 2nd step", changed(config, rollout={"suffix": Suffix()})),
    ]
    if gpu:
        found += [
            Variant("engine, CUDA graphs", changed(config, rollout={"graphs": True})),
            Variant("engine, suffix every 2nd step in float8", changed(config, rollout=float8)),
        ]
    if compiled:
        whole = compiled_config(config)
        found.append(Variant("engine, compiled", whole, compiled=True))
        if gpu:
            found.append(
                Variant(
                    "engine, compiled, suffix every 2nd step in float8",
                    changed(whole, rollout=float8),
                    compiled=True,
                )
            )
    return found


def compiled_config(config: Config) -> Config:
    return changed(config, rollout={"compile": "compile"}, training={"compile": "compile"})


def chosen(config: Config, args: argparse.Namespace) -> list[Variant]:
    """The variants of the command line. UserError if --only names none."""
    every = variants(config, args.compile, uses_gpu())
    found = [v for v in every if not args.only or any(part in v.name for part in args.only)]
    if not found:
        raise UserError(
            f"--only {' '.join(args.only)}: no such variant; there are"
            f" {', '.join(v.name for v in every)}"
        )
    return found


# -------------------------------------------------------------------------------------- measurement
def forward_flops(session, prompt: int) -> int:
    """FLOPs of one row's forward. prompt: the index of any prompt that is embedded."""
    device = session.policy.device
    x = torch.zeros(1, *session.sampler.latent_shape, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        session.sampler.velocity(
            session.policy.denoiser(),
            x,
            torch.ones(1, device=device),
            session.embed_prompts([prompt]),
        )
    return counter.get_total_flops()


def measure(
    benches: dict[bool, Bench],
    wanted: list[Variant],
    rounds: int,
    keep: Callable[[list[dict]], None],
) -> list[dict]:
    """The rows of all variants. benches: by whether their blocks are compiled. keep(rows so far) is
    called after every iteration."""
    runs = {v.name: v.kind(benches[v.compiled], v.config) for v in wanted}
    seen: dict[str, list[Iteration]] = {name: [] for name in runs}
    with Progress() as bar:
        task = bar.add_task("", total=(rounds + 1) * len(runs))
        for i in range(rounds + 1):
            for name, run in runs.items():
                bar.update(task, description=f"{'warm-up' if i == 0 else f'round {i}'}: {name}")
                result = run(i)
                if i == rounds:
                    run.free()
                if i > 0:
                    seen[name].append(result)
                    keep([summarise(name, results) for name, results in seen.items() if results])
                bar.advance(task)
    return [summarise(name, results) for name, results in seen.items()]


def summarise(name: str, results: list[Iteration]) -> dict:
    totals = [sum(result.seconds.values()) for result in results]
    return {
        "variant": name,
        "images": results[0].images,
        "forwards": results[0].forwards,
        "seconds": {
            phase: statistics.median(result.seconds[phase] for result in results)
            for phase in PHASES
        },
        "total_s": statistics.median(totals),
        "totals_s": totals,
        "images_per_s": results[0].images / statistics.median(totals),
    }


def add_ratios(rows: list[dict], flops: int, peaks: dict[str, float], config: Config) -> None:
    """Add ratios to the first row, and the share of the measured peak that the transformer reaches
    in each phase.

    Every variant trains on the same number of images; the trunks that the engine scores in addition
    count as work, not as output. A backward counts as two forwards, or as one if only adapters are
    trained; recomputation is not counted.
    """
    updates, references = config.training.updates.passes, int(config.needs_reference())
    policy = 2 if config.model.lora else 3
    per_row = (updates * policy + references) / (updates + references)
    for row in rows:
        row["times_faster"] = rows[0]["total_s"] / row["total_s"]
        row["train_times_faster"] = rows[0]["seconds"]["train"] / row["seconds"]["train"]
        row["mfu_train"] = (
            flops * per_row * row["forwards"]["train"] / row["seconds"]["train"] / peaks["train"]
        )
        row["mfu_rollout"] = (
            flops * row["forwards"]["rollout"] / row["seconds"]["rollout"] / peaks["rollout"]
        )


def show(rows: list[dict]) -> None:
    table = Table(title="one iteration")
    table.add_column("variant")
    for column in (
        "s",
        *PHASES,
        "pictures/s",
        "rows: rollout",
        "train",
        "times faster",
        "training",
        "MFU rollout",
        "train",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['total_s']:.2f}",
            *(f"{row['seconds'][phase]:.2f}" for phase in PHASES),
            f"{row['images_per_s']:.1f}",
            str(row["forwards"]["rollout"]),
            str(row["forwards"]["train"]),
            f"{row['times_faster']:.2f}x",
            f"{row['train_times_faster']:.2f}x",
            f"{100 * row['mfu_rollout']:.0f} %",
            f"{100 * row['mfu_train']:.0f} %",
        )
    Console(width=200).print(table)


def draw(rows: list[dict], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 * len(rows) + 1.6), layout="constrained")
    left = np.zeros(len(rows))
    names = [row["variant"] for row in rows]
    for phase in PHASES:
        values = np.array([row["seconds"][phase] for row in rows])
        axes.barh(names, values, left=left, label=phase)
        left += values
    for place, row in enumerate(rows):
        axes.text(left[place], place, f" {row['times_faster']:.1f}x", va="center")
    axes.set(xlabel="seconds per iteration", title=title, xlim=(0, left.max() * 1.1))
    axes.invert_yaxis()
    axes.legend(ncols=len(PHASES), fontsize=8)
    figure.savefig(file, dpi=130)


def benchmark(name: str, config: Config, args: argparse.Namespace) -> None:
    """Measure one config; print the table, write JSON and the chart."""
    benches = {False: Bench(config, args.rounds + 1)}
    if args.compile:
        benches[True] = Bench(compiled_config(config), args.rounds + 1, benches[False].session.pool)
    session = benches[False].session
    wanted = possible(chosen(config, args), session.policy.denoiser())
    out = args.output / f"throughput-{name}-{date.today()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with session.pool:
        with session.threads.shared():
            peaks = {"rollout": matmul_peak(session.policy.dtype, session.policy.device)}
        peaks["train"] = matmul_peak(session.runtime.dtype, session.policy.device)
        flops = forward_flops(session, benches[False].order.indices(0)[0])
        record = {
            "date": str(date.today()),
            "command": sys.argv,
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "config": config.model_dump(),
            "forward_flops": flops,
            "matmul_flops_per_s": peaks,
        }

        def keep(rows: list[dict]) -> None:
            add_ratios(rows, flops, peaks, config)
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
            whole = len(rows) == len(wanted) and all(
                len(row["totals_s"]) == args.rounds for row in rows
            )
            write_atomic(
                out,
                json.dumps(
                    record | {"complete": whole, "peak_memory_bytes": peak, "rows": rows}, indent=1
                ),
            )

        rows = measure(benches, wanted, args.rounds, keep)
    add_ratios(rows, flops, peaks, config)
    show(rows)
    draw(rows, out.with_suffix(".png"), f"{name}, {device_name()}, {date.today()}")
    print(out)


def possible(wanted: list[Variant], transformer: torch.nn.Module) -> list[Variant]:
    """The variants without those in float8, if the machine has no float8."""
    from tempflow.sampling.float8 import obstacle

    def in_float8(variant: Variant) -> bool:
        return (
            variant.config.rollout.suffix is not None
            and variant.config.rollout.suffix.weights == "float8"
        )

    reason = obstacle(transformer) if any(map(in_float8, wanted)) else None
    if reason:
        print(f"variants in float8 are left out: {reason}")
    return [variant for variant in wanted if not (reason and in_float8(variant))]


def announce(configs: dict[str, Config], args: argparse.Namespace) -> None:
    """Print how long it will take and how much memory it needs. UserError if the GPU has less."""
    gpu = uses_gpu()
    device = torch.device("cuda" if gpu else "cpu")
    for name, config in configs.items():
        speed = matmul_peak(torch.bfloat16 if gpu else torch.float32, device)
        wanted = chosen(config, args)
        found = forecast(
            [v.config for v in wanted],
            speed,
            engines=1 + args.compile,
            per_child=[v.kind is not Engine for v in wanted],
        )
        minutes = found.seconds * (args.rounds + 1) / 60
        print(
            f"{name}: about {minutes:.1f} minutes for {args.rounds} rounds and one to warm up,"
            f" rewards and loading not counted; up to {found.bytes / 1e9:.1f} GB of device memory"
        )
        if gpu and found.bytes + SPARE > torch.cuda.get_device_properties(0).total_memory:
            raise UserError(
                f"{name}: needs {(found.bytes + SPARE) / 1e9:.1f} GB, {device_name()} has"
                f" {torch.cuda.get_device_properties(0).total_memory / 1e9:.1f}; choose fewer"
                " variants (--only), leave --compile out, or take a smaller size (--quick, --set"
                " rollout.height)"
            )


def large_config(size: int, args: argparse.Namespace, path: str | Path = CARD) -> Config:
    """FLUX.1-dev's shape at size x size pixels, with weights from `path`."""
    settings = [
        *LARGE,
        f"model.path={path}",
        f"rollout.height={size}",
        f"rollout.width={size}",
        *args.set,
    ]
    return load_config(ROOT / "configs/flux_lora.json", settings)


@contextmanager
def random_flux() -> Iterator[Path]:
    """A temporary folder with a random FLUX.1-dev pipeline. UserError if the disk has too little
    space."""
    with tempfile.TemporaryDirectory(prefix="tempflow-flux-") as folder:
        free = shutil.disk_usage(folder).free
        if free < PIPELINE_BYTES:
            raise UserError(
                f"{folder}: {free / 1e9:.1f} GB free, the random pipeline needs"
                f" {PIPELINE_BYTES / 1e9:.0f}; set TMPDIR to another disk"
            )
        yield make_pipeline("flux-dev", Path(folder), scale=1.0, device="cuda")
        release()


def main() -> int:
    args = parse_arguments()
    if args.config or not uses_gpu():
        name = Path(args.config).stem if args.config else "tiny_flux"
        own = [] if args.config else [*SHIPPED, *(QUICK if args.quick else [])]
        config = load_config(args.config or ROOT / "configs/tiny_ocr.json", [*own, *args.set])
        announce({name: config}, args)
        benchmark(name, config, args)
        return 0
    sizes = (512,) if args.quick else (512, 1024)
    announce({f"flux-dev-{size}": large_config(size, args) for size in sizes}, args)
    with random_flux() as folder:
        release()
        for size in sizes:
            benchmark(f"flux-dev-{size}", large_config(size, args, folder), args)
            release()
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", help="default: the shipped model at the paper's proportions")
    parser.add_argument(
        "--rounds", type=int, help="iterations of every variant, after one to warm up (default 3)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round; without --config also one prompt and seed, or on a GPU 512 pixels alone",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="variants whose name contains one of these"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also the engine with compiled blocks, on weights of its own",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the report"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    return args


if __name__ == "__main__":
    cli.run(main)
