"""Iterations side by side: the paper's procedure, Flow-GRPO's, and this engine with each of its means off and on.

    python benchmarks/throughput.py [--config FILE] [--rounds N] [--only NAME ...] [--set section.key=value ...]

Without --config, on a CPU: the shipped model at the paper's proportions (T = 10, 4 seeds, 6 children, 9 branch steps, 2
prompts, KL on). On a GPU: FLUX.1-dev's shape with random weights (benchmarks/make_pipeline.py), LoRA, at 512 and 1024 pixels,
with three branch steps and one prompt, so that a round takes minutes. Every variant does whole iterations, one after another
in every round, on the same prompts: rollout, decoding, reward, updates. Printed and written to benchmarks/results/, with a
bar chart: seconds of every phase (medians over the rounds), pictures per second, transformer forwards, and the ratio to the
paper's procedure. Model FLOPs are set against a matrix product of the same dtype measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from make_pipeline import make_pipeline
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from tempflow import cli
from tempflow.config import Config, Suffix, load_config
from tempflow.logs import write_atomic
from tempflow.machine import device_name, versions
from tempflow.prompts import PromptOrder, load_prompts
from tempflow.rewards import RewardPool, check_prompts, parse_rewards
from tempflow.rollout.noise import INITIAL, key_tensor, noise_key
from tempflow.rollout.plan import Unit, iteration_units
from tempflow.rollout.scheduler import Decision, RolloutStats
from tempflow.sde import ode_coefficients
from tempflow_kernels import normal, sde_step

ROOT = Path(__file__).parent.parent
SHIPPED = [
    "data.prompts_per_iteration=2", "rollout.seeds=4", "rollout.children=6", "rollout.branch_steps=all", "rollout.suffix=null",
    "training.kl_coef=0.004", "training.updates_per_rollout=1", "training.ema=null", "training.minutes=null", "eval.every=0",
]  # fmt: skip
LARGE = [
    "data.prompts_per_iteration=1", "rollout.seeds=1", "rollout.children=6", "rollout.branch_steps=[0,4,8]",
    'rewards={"jpeg": 1.0}', "eval.every=0", "training.ema=null", "training.updates_per_rollout=1", "rollout.micro_batch=6",
]  # fmt: skip
PHASES = ("rollout", "decode", "reward", "train", "sync")


class Bench:
    """The engine's own parts on one config: what all variants share."""

    def __init__(self, config: Config, pool: RewardPool | None = None):
        cli.quiet_libraries()
        from tempflow.policy import check_model, load_policy
        from tempflow.policy.embeddings import EmbeddingCache
        from tempflow.trainer import comm
        from tempflow.trainer.process import Threads, device
        from tempflow.trainer.runtime import Runtime

        comm.init_distributed()
        self.config = config
        self.specs = parse_rewards(config.rewards)
        self.prompts = load_prompts(config.data.train, "data.train")
        check_prompts(self.specs, [p.text for p in self.prompts], [p.metadata for p in self.prompts])
        check_model(config.model.path)
        self.threads = Threads(config)
        self.pool = pool or RewardPool(self.specs, **config.reward_pool.pool())
        self.policy = load_policy(config.model.path, dtype=config.model.dtype, device=device(),
                                  max_sequence_length=config.model.max_sequence_length)  # fmt: skip
        self.embeddings = EmbeddingCache(self.policy)
        self.runtime = Runtime(config, self.policy)
        self.order = PromptOrder(len(self.prompts), config.data.prompts_per_iteration, config.training.seed)
        self.pool.wait_ready()

    def collector(self, config: Config):
        from tempflow.trainer.collect import Collector

        return Collector(config, self.policy, self.prompts, self.embeddings, self.pool, self.specs)

    def embed(self, units):
        return self.embeddings.get([self.prompts[unit.prompt_id].text for unit in units])

    def changed(self, **sections) -> Config:
        """The config with some keys of some sections changed."""
        config = self.config.model_copy(deep=True)
        for section, keys in sections.items():
            for key, value in keys.items():
                setattr(getattr(config, section), key, value)
        return config


@dataclass
class Iteration:
    """What one iteration took. seconds: per phase. forwards: rows in the rollout and in training (no backward)."""

    seconds: dict[str, float]
    images: int
    forwards: dict[str, int] = field(default_factory=dict)


def engine_iterations(bench: Bench, config: Config) -> Callable[[int], Iteration]:
    """As the trainer runs them: on one collector, whose graphs and copies last."""
    collector = lru_cache(lambda: bench.collector(config))
    return lambda iteration: engine_iteration(bench, config, collector(), iteration)


def engine_iteration(bench: Bench, config: Config, collector, iteration: int) -> Iteration:
    with bench.threads.shared():
        data = collector.collect(iteration, bench.order.indices(iteration))
    started = time.perf_counter()
    trained = train(bench, config, collector, data, config.training.micro_batch)
    synchronize()
    seconds = {**{k: data.times[k] for k in ("rollout", "decode", "reward")}, "train": time.perf_counter() - started}
    return Iteration(seconds | {"sync": refresh(bench)}, data.images, {"rollout": data.stats.forwards, "train": trained})


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train(bench: Bench, config: Config, collector, data, micro_batch: int) -> int:
    """The updates on a rollout's decisions; returns the rows forwarded."""
    from tempflow.advantages import advantages
    from tempflow.objective import make_batches, select
    from tempflow.sde import noise_weights
    from tempflow.trainer.update import Updater

    t = config.training
    adv = advantages(data.rewards, group=t.advantage_group, global_std=t.global_std, clip=t.adv_clip)
    chosen = select(data.decisions, adv, data.steps, keep_all=t.kl_coef > 0)
    count = -(-len(chosen) // micro_batch)
    weights = noise_weights(collector.sde.tau, data.steps, t.weighting)
    batches = make_batches(chosen, data.decisions[0], count, -(-len(chosen) // count), collector.sigmas, collector.sde, weights,
                           bench.policy.device)  # fmt: skip
    updater = Updater(config, bench.runtime, bench.embed)
    total = int(np.prod(data.rewards.shape[:3]))
    return sum(updater.update(batches, total, 1.0, u == 0)["forwards"] for u in range(t.updates_per_rollout))


def refresh(bench: Bench) -> float:
    started = time.perf_counter()
    bench.runtime.refresh(bench.policy.transformer)
    synchronize()
    return time.perf_counter() - started


class Sequential:
    """The paper's procedure: branch steps one after another, each with its B children as one small batch that is
    integrated, decoded and rewarded before the next begins; then training with a forward for every child."""

    def __init__(self, bench: Bench, config: Config):
        self.bench, self.config, self.collector = bench, config, bench.collector(config)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.stats = RolloutStats()

    def __call__(self, iteration: int) -> Iteration:
        r = self.config.rollout
        units = iteration_units(self.bench.order.indices(iteration), r.seeds)
        steps = self.config.steps_with_noise()
        rewards = np.zeros((self.config.data.prompts_per_iteration, r.seeds, len(steps), r.children))
        decisions = []
        with torch.no_grad():  # rewards are waited for, so all cores are the model's
            for unit in units:
                trunk = self.trunk(unit, iteration)
                for place, k in enumerate(steps):
                    decision, values = self.branch(unit, iteration, k, trunk[k])
                    decisions.append(decision)
                    rewards[unit.prompt, unit.seed, place] = values
        data = _Data(decisions, rewards, steps)
        started = time.perf_counter()
        trained = train(self.bench, self.config, self.collector, data, micro_batch=1)
        self.seconds["train"] = time.perf_counter() - started
        self.seconds["sync"] = refresh(self.bench)
        return Iteration(self.seconds, rewards.size, {"rollout": self.stats.forwards, "train": trained})

    def trunk(self, unit: Unit, iteration: int) -> list[torch.Tensor]:
        started = time.perf_counter()
        key = key_tensor([self.key(unit, iteration, INITIAL, 0)], self.bench.policy.device)
        x = normal(key, int(np.prod(self.collector.latent_shape))).reshape(1, *self.collector.latent_shape)
        states = [x]
        for k in range(self.config.rollout.num_steps - 1):
            states.append(self.step(states[-1], k, unit))
        self.seconds["rollout"] += time.perf_counter() - started
        return states

    def branch(self, unit: Unit, iteration: int, k: int, x: torch.Tensor) -> tuple[Decision, np.ndarray]:
        r, sde, started = self.config.rollout, self.collector.sde, time.perf_counter()
        keys = [[self.key(unit, iteration, k, i)] for i in range(r.children)]
        copies = x.expand(r.children, *x.shape[1:])
        children, log_prob = self.transition(copies, k, unit, (sde.a[k], sde.b[k], sde.tau[k]), keys)
        latents = children
        for later in range(k + 1, r.num_steps):
            latents = self.step(latents, later, unit)
        synchronize()
        self.seconds["rollout"] += time.perf_counter() - started
        started = time.perf_counter()
        images, _ = self.bench.policy.decode(latents, r.height, r.width)
        self.seconds["decode"] += time.perf_counter() - started
        return Decision(unit, k, x[0], children, log_prob), self.score(unit, images)

    def score(self, unit: Unit, images: np.ndarray) -> np.ndarray:
        from tempflow.rewards import combine

        started, prompt = time.perf_counter(), self.bench.prompts[unit.prompt_id]
        ticket = self.bench.pool.submit(images, [prompt.text] * len(images), [prompt.metadata] * len(images))
        values = combine(self.bench.pool.gather([ticket])[0], self.bench.specs).values
        self.seconds["reward"] += time.perf_counter() - started
        return values

    def step(self, x, k: int, unit: Unit) -> torch.Tensor:
        ode = ode_coefficients(self.collector.sigmas)
        return self.transition(x, k, unit, (ode.a[k], ode.b[k], ode.tau[k]), [[0]] * len(x))[0]

    def transition(self, x, k: int, unit: Unit, scalars, keys):
        r, n, device = self.config.rollout, len(x), x.device
        v = self.bench.policy.velocity(
            self.bench.policy.transformer, x, self.collector.sigmas[k].expand(n).to(device), self.bench.embed([unit] * n),
            height=r.height, width=r.width, guidance_scale=r.guidance_scale,
        )  # fmt: skip
        self.stats.forwards += n
        a, b, tau = (s.expand(n).to(device) for s in scalars)
        x_next, log_prob = sde_step(x, v, a, b, tau, key=key_tensor(keys, device), out_dtype=torch.float32)
        return x_next[:, 0], log_prob[:, 0]

    def key(self, unit: Unit, iteration: int, step: int, child: int) -> int:
        return noise_key(self.config.training.seed, iteration, unit.prompt_id, unit.seed, step, child)


@dataclass
class _Data:
    """The part of a Collected that training reads."""

    decisions: list[Decision]
    rewards: np.ndarray
    steps: list[int]


def variants(bench: Bench, compiled: Bench | None = None) -> dict[str, Callable[[int], Iteration]]:
    """What is compared: the paper's procedure, Flow-GRPO at as many rewarded pictures, and the engine part by part."""
    r = bench.config.rollout
    branches = len(bench.config.steps_with_noise())
    separate = bench.changed(training={"share_group_forward": False})
    flow = bench.changed(rollout={"plan": "flow_grpo", "seeds": r.seeds * branches * r.children},
                         training={"advantage_group": "prompt"})  # fmt: skip
    from tempflow.rollout.float8 import obstacle

    coarse = bench.changed(rollout={"suffix": Suffix()})
    more = {}
    if torch.cuda.is_available():
        graphs = bench.changed(rollout={"graphs": True})
        more["engine, CUDA graphs"] = engine_iterations(bench, graphs)
        if not obstacle(bench.policy.transformer):
            for name, at in {"engine": bench, "engine, compiled": compiled}.items():
                if at:
                    float8 = at.changed(rollout={"suffix": Suffix(weights="float8")})
                    more[f"{name}, suffix every 2nd step in float8"] = engine_iterations(at, float8)
    if compiled:
        more["engine, compiled"] = engine_iterations(compiled, compiled.config)
    return {
        "paper's procedure": lambda i: Sequential(bench, separate)(i),
        "Flow-GRPO, as many pictures": engine_iterations(bench, flow),
        "engine, one forward per child": engine_iterations(bench, separate),
        "engine": engine_iterations(bench, bench.config),
        "engine, suffix every 2nd step": engine_iterations(bench, coarse),
        **more,
    }


# ------------------------------------------------------------------------------------------------ peak and model FLOPs
def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def forward_flops(bench: Bench) -> int:
    """FLOPs of one row's forward."""
    r, policy = bench.config.rollout, bench.policy
    x = torch.zeros(1, *policy.latent_shape(r.height, r.width), device=policy.device)
    unit = iteration_units(bench.order.indices(0), 1)[:1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy.velocity(policy.transformer, x, torch.ones(1, device=policy.device), bench.embed(unit), height=r.height,
                        width=r.width, guidance_scale=r.guidance_scale)  # fmt: skip
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------- report
def measure(bench: Bench, rounds: int, only: list[str] | None, compiled: Bench | None = None) -> list[dict]:
    chosen = {name: run for name, run in variants(bench, compiled).items() if not only or any(o in name for o in only)}
    seen: dict[str, list[Iteration]] = {name: [] for name in chosen}
    with Progress() as bar:
        task = bar.add_task("", total=(rounds + 1) * len(chosen))
        for i in range(rounds + 1):
            for name, run in chosen.items():
                bar.update(task, description=f"{'warm-up' if i == 0 else f'round {i}'}: {name}")
                result = run(i)
                if i > 0:
                    seen[name].append(result)
                bar.advance(task)
    return [summarise(name, results) for name, results in seen.items()]


def summarise(name: str, results: list[Iteration]) -> dict:
    totals = [sum(result.seconds.values()) for result in results]
    return {
        "variant": name, "images": results[0].images, "forwards": results[0].forwards,
        "seconds": {phase: statistics.median(result.seconds[phase] for result in results) for phase in PHASES},
        "total_s": statistics.median(totals), "totals_s": totals, "images_per_s": results[0].images / statistics.median(totals),
    }  # fmt: skip


def add_ratios(rows: list[dict], flops: int, peaks: dict[str, float], config: Config) -> None:
    """Ratios to the first row, and the share of the measured peak that the transformer reaches in each phase.

    Every variant trains on as many pictures; the engine's trunks, scored besides, count as its work, not as its output.
    A backward counts as two forwards, as one where only adapters are trained; recomputation is not counted.
    """
    updates, references = config.training.updates_per_rollout, int(config.training.kl_coef > 0)
    policy = 2 if config.model.lora else 3
    per_row = (updates * policy + references) / (updates + references)
    for row in rows:
        row["times_faster"] = rows[0]["total_s"] / row["total_s"]
        row["train_times_faster"] = rows[0]["seconds"]["train"] / row["seconds"]["train"]
        row["mfu_train"] = flops * per_row * row["forwards"]["train"] / row["seconds"]["train"] / peaks["train"]
        row["mfu_rollout"] = flops * row["forwards"]["rollout"] / row["seconds"]["rollout"] / peaks["rollout"]


def show(rows: list[dict]) -> None:
    table = Table(title="one iteration")
    table.add_column("variant")
    for column in ("s", *PHASES, "pictures/s", "rows: rollout", "train", "times faster", "training", "MFU rollout", "train"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["variant"], f"{row['total_s']:.2f}", *(f"{row['seconds'][phase]:.2f}" for phase in PHASES),
            f"{row['images_per_s']:.1f}", str(row["forwards"]["rollout"]), str(row["forwards"]["train"]),
            f"{row['times_faster']:.2f}x", f"{row['train_times_faster']:.2f}x", f"{100 * row['mfu_rollout']:.0f} %",
            f"{100 * row['mfu_train']:.0f} %",
        )  # fmt: skip
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="default: the shipped model at the paper's proportions")
    parser.add_argument("--rounds", type=int, default=3, help="iterations of every variant, after one to warm up")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants whose name contains one of these")
    parser.add_argument("--compile", action="store_true", help="also the engine with compiled blocks, on weights of its own")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the report")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    if args.config:
        benchmark(Path(args.config).stem, load_config(args.config, args.set), args)
    elif torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as folder:
            make_pipeline("flux-dev", Path(folder), scale=1.0, device="cuda")
            for size in (512, 1024):
                large = [*LARGE, f"model.path={folder}", f"rollout.height={size}", f"rollout.width={size}"]
                benchmark(f"flux-dev-{size}", load_config(ROOT / "configs/flux_lora.json", [*large, *args.set]), args)
    else:
        benchmark("tiny_flux", load_config(ROOT / "configs/tiny_ocr.json", [*SHIPPED, *args.set]), args)
    return 0


def benchmark(name: str, config: Config, args: argparse.Namespace) -> None:
    """Measure one config; print the table, write JSON and the chart."""
    bench = Bench(config)
    compiled = None
    if args.compile:
        compiled = Bench(bench.changed(rollout={"compile": "compile"}, training={"compile": "compile"}), bench.pool)
    with bench.pool:
        with bench.threads.shared():
            peaks = {"rollout": matmul_peak(bench.policy.dtype, bench.policy.device)}
        peaks["train"] = matmul_peak(bench.runtime.dtype, bench.policy.device)
        flops = forward_flops(bench)
        rows = measure(bench, args.rounds, args.only, compiled)
    add_ratios(rows, flops, peaks, config)
    show(rows)
    out = args.output / f"throughput-{name}-{date.today()}.json"
    record = {"date": str(date.today()), "command": sys.argv, "device": device_name(), "threads": torch.get_num_threads(),
              "versions": versions(), "config": config.model_dump(), "forward_flops": flops, "matmul_flops_per_s": peaks,
              "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
              "rows": rows}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(record, indent=1))
    draw(rows, out.with_suffix(".png"), f"{name}, {device_name()}, {date.today()}")
    print(out)


if __name__ == "__main__":
    cli.run(main)
