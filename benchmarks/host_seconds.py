"""Host seconds of a training micro-batch under ZeRO stage 3, against the plain module's.

    python benchmarks/host_seconds.py [--rounds 15] [--only full] [--profile] [--set KEY=VALUE ...]
    deepspeed --num_accelerators 2 benchmarks/host_seconds.py

FLUX.1-dev's module tree, 19 double and 38 single blocks, so narrow that computing costs nothing:
what is left is the host's work, Python and the launches of operators. Settings are those of
configs/flux_zero3.json, with LoRA and without; DeepSpeed's thresholds are scaled so that the same
weights stay whole, and as large a part of the others is fetched ahead. In every round the engine
and the plain module do one forward and backward each, in turn, on the same state.

Counted is the processor time of the thread that drives the GPU in a real run, so that waits for
other ranks and other processes' load matter little; wall time is in the report beside it. On a CPU
collectives are Gloo's, on the thread's own time where they start.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Callable
from unittest import mock

if __name__ == "__main__":
    # last: kernels.py in this folder must not pass for Hugging Face's package
    sys.path.append(sys.path.pop(0))

import numpy as np
import torch
from bench import changed
from deepspeed.accelerator import get_accelerator
from gpu_steps.models import card_folder, random_policy
from make_pipeline import random_model
from rich.console import Console
from rich.table import Table

from tempflow import cli
from tempflow.config import Config, Lora, load_config
from tempflow.models.hub import CARDS
from tempflow.run.environment import device_name, versions
from tempflow.run.logs import write_atomic
from tempflow.training import distributed
from tempflow.training import engine as runtime
from tempflow.types import Example

ROOT = Path(__file__).parent.parent
CARD = "flux-dev"
NARROW = {
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
}
ADAPTERS = {"real": Lora(rank=32, alpha=64.0), "narrow": Lora(rank=4, alpha=8.0)}
PIXELS, TOKENS = 64, 16
LINEAR = torch.nn.functional.linear  # which ZeRO stage 3 may replace for the whole process
CLOCKS = {"thread": time.thread_time, "process": time.process_time, "wall": time.perf_counter}
# of DeepSpeed, in elements
THRESHOLDS = {
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "reduce_bucket_size": 5e8,
}
PERSISTENT = "stage3_param_persistence_threshold"


# ------------------------------------------------------------------------------------------ configs
def narrow_folder(scratch: Path) -> Path:
    """The card's folder with a transformer of as many blocks, 16 wide."""
    folder = card_folder(CARD, scratch, None, rehearse=True)
    config = json.loads((CARDS / CARD / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(config | NARROW))
    return folder


def sizes(config: dict, lora: Lora | None, targets: tuple[str, ...]) -> dict[str, int]:
    """Elements of each weight of a transformer."""
    module = random_model("diffusers", "FluxTransformer2DModel", config, "meta")
    if lora:
        runtime.add_lora(module, lora, targets, 0)
    return {name: p.numel() for name, p in module.named_parameters()}


def scaled(zero: dict, real: dict[str, int], narrow: dict[str, int]) -> dict:
    """A `zero_optimization` section for the narrow transformer that does what it does for the real
    one."""
    share = sum(narrow.values()) / sum(real.values())
    found = {key: int(zero.get(key, default) * share) for key, default in THRESHOLDS.items()}
    limit = zero.get(PERSISTENT, 1e5)
    kept = max((narrow[name] for name, size in real.items() if size <= limit), default=0)
    assert all(narrow[name] > kept for name, size in real.items() if size > limit)
    return zero | found | {PERSISTENT: kept}


def narrow_config(folder: Path, lora: bool, settings: list[str]) -> Config:
    own = [
        f"model.path={folder}",
        f"rollout.height={PIXELS}",
        f"rollout.width={PIXELS}",
        f"model.max_sequence_length={TOKENS}",
        "rollout.replica=false",
        "rollout.graphs=false",
        "training.micro_batch=1",
        "training.ema=null",
        *settings,
    ]
    config = load_config(ROOT / "configs/flux_zero3.json", own)
    targets = runtime_targets(folder)
    tables = {
        "real": json.loads((CARDS / CARD / "transformer/config.json").read_text()),
        "narrow": json.loads((folder / "transformer/config.json").read_text()),
    }
    both = [sizes(tables[name], ADAPTERS[name] if lora else None, targets) for name in ADAPTERS]
    zero = scaled(config.deepspeed["zero_optimization"], *both)
    return changed(
        config,
        model={"lora": ADAPTERS["narrow"] if lora else None},
        deepspeed={},
    ).model_copy(update={"deepspeed": config.deepspeed | {"zero_optimization": zero}})


def runtime_targets(folder: Path) -> tuple[str, ...]:
    from tempflow.models import family_of

    return family_of(str(folder)).lora_targets


# ------------------------------------------------------------------------------------------ measure
@dataclass
class Side:
    """One of the two that are compared. linear: what F.linear is meanwhile."""

    module: torch.nn.Module
    backward: Callable[[torch.Tensor], None]
    linear: Callable


class Case:
    """The engine and the plain module on one state."""

    def __init__(self, config: Config, targets: tuple[str, ...]):
        self.config = config
        dtype = torch.bfloat16
        self.policy = random_policy(config, torch.device("cpu"), dtype)
        plain, trained = self.policy.denoiser().train(), self._transformer(dtype)
        torch.nn.functional.linear = LINEAR
        with mock.patch.object(runtime, "load_denoiser", lambda path, dtype: trained):
            self.runtime = runtime.Runtime(config, self.policy)
        self.sides = {
            "plain": Side(self._prepared(plain, targets), torch.Tensor.backward, LINEAR),
            "ZeRO-3": Side(
                self.runtime.engine,
                lambda loss: self.runtime.accumulate(loss, last=False),
                torch.nn.functional.linear,
            ),
        }
        torch.nn.functional.linear = LINEAR
        self.text = self.policy.embed([Example("a")])
        self.x = torch.randn(1, *self.policy.latent_shape(config.rollout.size))

    def _transformer(self, dtype: torch.dtype) -> torch.nn.Module:
        file = Path(self.config.model.path) / "transformer/config.json"
        table = json.loads(file.read_text())
        return random_model("diffusers", "FluxTransformer2DModel", table, "cpu", dtype).train()

    def _prepared(self, plain, targets: tuple[str, ...]) -> torch.nn.Module:
        """As the runtime prepares its own."""
        plain.requires_grad_(True)
        if self.config.model.lora:
            runtime.add_lora(plain, self.config.model.lora, targets, self.config.training.seed)
        if self.config.model.gradient_checkpointing:
            plain.enable_gradient_checkpointing()
        return plain

    def micro_batch(self, name: str) -> None:
        """Forward and backward of one state."""
        side, size = self.sides[name], self.config.rollout.size
        with mock.patch.object(torch.nn.functional, "linear", side.linear):
            sigma = torch.tensor([0.7])
            v = self.policy.velocity(side.module, self.x, sigma, self.text, size, 3.5)
            side.backward(v.float().square().mean())


def measure(case: Case, rounds: int) -> dict[str, dict[str, np.ndarray]]:
    """Seconds of each round by side and clock, after three rounds to warm up: DeepSpeed writes the
    order of modules down in its second."""
    taken: dict = {name: {clock: [] for clock in CLOCKS} for name in case.sides}
    for _ in range(rounds + 3):
        for name in case.sides:
            before = {clock: read() for clock, read in CLOCKS.items()}
            case.micro_batch(name)
            for clock, read in CLOCKS.items():
                taken[name][clock].append(read() - before[clock])
    return {
        name: {clock: np.array(values[3:]) for clock, values in clocks.items()}
        for name, clocks in taken.items()
    }


def summarise(name: str, taken: dict[str, dict[str, np.ndarray]]) -> dict:
    """A row: per side and clock the median with its 20 % and 80 % quantiles, the ratios of medians,
    and the same quantiles of the ratios of single rounds, which show how steady they are."""
    rows = {
        side: {clock: quantiles(values) for clock, values in clocks.items()}
        for side, clocks in taken.items()
    }
    ratios = {clock: rows["ZeRO-3"][clock][0] / rows["plain"][clock][0] for clock in CLOCKS}
    pairs = {clock: quantiles(taken["ZeRO-3"][clock] / taken["plain"][clock]) for clock in CLOCKS}
    return {"case": name, "seconds": rows, "ratio": ratios, "ratio_of_rounds": pairs}


def quantiles(values: np.ndarray) -> list[float]:
    """The median and the 20 % and 80 % quantiles."""
    return [float(np.quantile(values, q)) for q in (0.5, 0.2, 0.8)]


def show(rows: list[dict]) -> None:
    table = Table("weights", "plain, s", "ZeRO-3, s", "ratio", "of rounds", "of wall time")
    for row in rows:
        seconds = [
            "{:.3f} ({:.3f} to {:.3f})".format(*row["seconds"][side]["thread"])
            for side in ("plain", "ZeRO-3")
        ]
        rounds = "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio_of_rounds"]["thread"])
        ratio, wall = (f"{row['ratio'][clock]:.2f}" for clock in ("thread", "wall"))
        table.add_row(row["case"], *seconds, ratio, rounds, wall)
    Console().print(table)


def profile(case: Case) -> None:
    """Print where each side's time goes."""
    for name in case.sides:
        with cProfile.Profile() as seen:
            case.micro_batch(name)
        print(name)
        pstats.Stats(seen).sort_stats("tottime").print_stats(40)


# --------------------------------------------------------------------------------------------- main
def main() -> int:
    args = parse_arguments()
    cli.quiet_libraries()
    torch.set_num_threads(1)
    distributed.init_distributed()
    ranks = distributed.world_size()
    # DeepSpeed asks for it in every reduction, which on a CPU starts a program each time
    get_accelerator().device_count = lambda: ranks
    rows = []
    with tempfile.TemporaryDirectory(prefix="tempflow-host-") as scratch:
        folder = narrow_folder(Path(scratch))
        for name in args.only:
            config = narrow_config(folder, name == "lora", args.set)
            case = Case(config, runtime_targets(folder))
            rows.append(summarise(name, measure(case, args.rounds)))
            if args.profile and distributed.rank() == 0:
                profile(case)
    if distributed.rank() == 0:
        show(rows)
        write(rows, config, args.output)
    return 0


def write(rows: list[dict], config: Config, folder: Path) -> None:
    ranks = distributed.world_size()
    record = {
        "date": str(date.today()),
        "command": sys.argv,
        "device": device_name(),
        "versions": versions(),
        "ranks": ranks,
        "zero_optimization": config.deepspeed["zero_optimization"],
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"host-seconds-{ranks}x-zero3-{date.today()}.json"
    write_atomic(file, json.dumps(record, indent=1))
    print(file)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the report"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher gives it
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
