"""Kills a run at random moments, resumes it each time, and compares the result with an undisturbed
run.

    python benchmarks/faults.py [--faults 20] [--processes 1] [--stage 0] [--seed 0]

A short run of the shipped model is made once without faults. Then the same run is started again and
disturbed: by kill -9 of all processes, kill -9 of one rank, SIGTERM, or kill -9 of a reward worker;
after each fault it is resumed with `--resume`. At its end its metrics must equal the undisturbed
run's, except for times, and its weights must be bit-identical. If more faults are asked for than
one run takes, further runs are made. The results are written to benchmarks/results/ as JSON and as
a table.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tempflow import cli
from tempflow.errors import UserError
from tempflow.run.environment import device_name, versions
from tempflow.run.logs import read_metrics, write_atomic

ROOT = Path(__file__).parent.parent
SHORT = [
    "data.prompts_per_iteration=2",
    "rollout.plan.children=2",
    "rollout.plan.branch_steps=[0,4,8]",
    "rollout.num_steps=10",
    'rewards={"jpeg": 1.0}',
    "training.iterations=8",
    "training.minutes=null",
    "training.micro_batch=4",
    "eval.every=4",
    "eval.prompts=8",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "logging.tensorboard=false",
]
FAULTS = (
    "kill -9 of everything",
    "kill -9 of one rank",
    "SIGTERM to the ranks",
    "kill -9 of a reward worker",
)
TIMEOUT_S = 900


class Process:
    """engine/train.py under the deepspeed launcher, in a session of its own."""

    def __init__(self, args: argparse.Namespace, name: str, resume: bool):
        launcher = Path(sys.executable).with_name("deepspeed")
        overrides = [
            *SHORT,
            f"deepspeed.zero_optimization.stage={args.stage}",
            f"logging.dir={args.runs}",
            f"logging.name={name}",
        ]
        command = [
            str(launcher),
            "--num_accelerators",
            str(args.processes),
            "engine/train.py",
            "--config",
            "configs/tiny_ocr.json",
        ]
        command += [part for override in overrides for part in ("--set", override)] + [
            "--resume"
        ] * resume
        self.log = open(args.runs / f"{name}.log", "a")
        self.launcher = subprocess.Popen(
            command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def running(self) -> bool:
        return self.launcher.poll() is None

    def wait(self) -> int:
        status = self.launcher.wait(TIMEOUT_S)
        self.log.close()
        return status

    def strike(self, fault: str, rng: random.Random) -> bool:
        """Inject a fault. False if its target does not exist yet. A worker's death does not end the
        run."""
        everybody = psutil.Process(self.launcher.pid).children(recursive=True)
        ranks = [
            p
            for p in everybody
            if "--local_rank" in " ".join(_command(p)) and "launch" not in " ".join(_command(p)[:4])
        ]
        workers = [p for p in everybody if "tempflow.rewards.worker_main" in _command(p)]
        victims = {
            FAULTS[0]: [psutil.Process(self.launcher.pid), *everybody],
            FAULTS[1]: ranks[-1:],
            FAULTS[2]: ranks,
            FAULTS[3]: rng.sample(workers, 1) if workers else [],
        }[fault]
        for victim in victims:
            try:
                victim.send_signal(signal.SIGTERM if fault == FAULTS[2] else signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        return bool(victims)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def disturbed(
    args: argparse.Namespace, name: str, length: float, rng: random.Random, budget: int
) -> list[dict]:
    """Make one run with up to `budget` faults. Returns what was done to it, and how far it had come
    each time."""
    seen: list[dict] = []
    run_dir = args.runs / name
    while not (run_dir / "summary.json").exists():
        process = Process(args, name, resume=(run_dir / "config.json").exists())
        while len(seen) < budget and process.running():
            time.sleep(rng.uniform(0, length))
            fault = rng.choice(FAULTS)
            if process.running() and process.strike(fault, rng):
                done = [row["iteration"] for row in read_metrics(run_dir)]
                seen.append(
                    {"fault": fault, "run": name, "after_iteration": max(done, default=None)}
                )
                if fault != FAULTS[3]:
                    break
        status = process.wait()
        if (
            status
            and len(seen) >= budget
            and not (run_dir / "summary.json").exists()
            and not _just_struck(seen)
        ):
            raise UserError(f"{name} ended with status {status}, see {args.runs / name}.log")
        if seen:
            seen[-1].setdefault("exit", status)
    return seen


def _just_struck(seen: list[dict]) -> bool:
    return bool(seen) and "exit" not in seen[-1]


def same(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, except for times; [] if nothing does."""
    differences = []
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run)]
        for run in (one, other)
    ]
    if rows[0] != rows[1]:
        differences.append("metrics")
    newest = [sorted((run / "checkpoints").glob("[0-9]*"))[-1] for run in (one, other)]
    for name in ("weights.safetensors", "ema.safetensors"):
        if (newest[0] / name).read_bytes() != (newest[1] / name).read_bytes():
            differences.append(name)
    return differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/faults", help="folder of the runs; emptied first"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the report"
    )
    args = parser.parse_args()
    shutil.rmtree(args.runs, ignore_errors=True)
    args.runs.mkdir(parents=True)
    rng, started = random.Random(args.seed), time.monotonic()
    if Process(args, "undisturbed", resume=False).wait():
        raise UserError(f"the undisturbed run failed, see {args.runs / 'undisturbed.log'}")
    length, faults, broken = time.monotonic() - started, [], {}
    while len(faults) < args.faults:
        name = f"disturbed{len(broken)}"
        faults += disturbed(args, name, length, rng, args.faults - len(faults))
        broken[name] = same(args.runs / "undisturbed", args.runs / name)
        print(
            f"{name}: {len(faults)} faults so far;"
            f" {'differs in ' + ', '.join(broken[name]) if broken[name] else 'equal'}",
            flush=True,
        )
    table = Table("fault", "times", "runs differing from the undisturbed one")
    for fault in FAULTS:
        runs = {one["run"] for one in faults if one["fault"] == fault}
        table.add_row(
            fault,
            str(sum(one["fault"] == fault for one in faults)),
            f"{sum(bool(broken[r]) for r in runs)} of {len(runs)}",
        )
    Console().print(table)
    out = args.output / f"faults-{args.processes}x-zero{args.stage}-{date.today()}.json"
    record = {
        "date": str(date.today()),
        "command": sys.argv,
        "device": device_name(),
        "versions": versions(),
        "faults": faults,
        "differences": broken,
        "minutes": (time.monotonic() - started) / 60,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, json.dumps(record, indent=1))
    print(out)
    return 1 if any(broken.values()) else 0


if __name__ == "__main__":
    cli.run(main)
