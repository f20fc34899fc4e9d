"""Tests and measures this engine on a GPU in ten minutes: memory, correctness, speed, and failures.

    python benchmarks/gpu.py [--minutes N] [--only STEP ...] [--out FILE]
    python benchmarks/gpu.py --rehearse [--only STEP ...]

The steps are in gpu_steps/, cheap and fundamental ones first. Each runs in a process
of its own with a time limit. A step that fails, or runs out of time or memory, is recorded with its
reason, and the next one follows. If --minutes is short (10 is enough on an H100), the last steps
are dropped; if it is long, all steps get more time. It needs one CUDA GPU, no network, and no
weights but those of the small model: FLUX.1-dev's weights are random and made on the card.

Results are written to benchmarks/results/gpu-CARD-DATE.json as they come, with a Markdown page at
the end. The parts of the engine that ran correctly are entered into
benchmarks/results/hardware.json, from which `python docs/make_hardware_table.py` makes the README's
table. --rehearse runs the code of every step on a CPU at tiny sizes, which says nothing about a
GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

if __name__ == "__main__":
    # This folder goes to the end of the path: its kernels.py would be imported in place of
    # Hugging Face's package `kernels`.
    sys.path.append(sys.path.pop(0))

import psutil
from gpu_steps import BY_NAME, STEPS, Step, hardware
from gpu_steps.report import Report

from tempflow import cli
from tempflow.errors import UserError
from tempflow.run.environment import check_gpu, uses_gpu

ROOT = Path(__file__).parent.parent
GOOD = ("ok", "rehearsed", "skipped")
MINUTES, TAIL = 10.0, 3000  # TAIL: characters of a failed step's output that are kept


def plan(steps: list[Step], seconds: float) -> dict[str, float]:
    """The seconds of each step within `seconds`, by name, in order. If they are too few, the last
    steps are dropped; if they are more than enough, all steps get more in proportion."""
    kept, total = {}, 0
    for step in steps:
        total += step.seconds
        if kept and total > seconds:
            break
        kept[step.name] = step.seconds
    scale = max(1.0, seconds / sum(kept.values())) if len(kept) == len(steps) else 1.0
    return {name: share * scale for name, share in kept.items()}


def run_steps(steps: list[Step], args: argparse.Namespace, report: Report) -> None:
    """Run all steps. Each may use the time that is left, except what is reserved for the steps
    after it."""
    ends = time.monotonic() + 60 * args.minutes
    shares = plan(steps, 60 * args.minutes)
    for step in steps:
        if step.name not in shares:
            reason = f"dropped: --minutes {args.minutes:g} is not enough for it"
            done = {
                "status": "skipped",
                "reason": reason,
                "result": {},
                "proved": [],
                "seconds": 0.0,
            }
        else:
            promised = sum(list(shares.values())[list(shares).index(step.name) + 1 :])
            done = run_step(step, args.rehearse, max(ends - time.monotonic() - promised, 1.0))
        report.add({"name": step.name, **done})
        if report.file is None:
            _identify(report, done["result"], args)
        print(
            f"{step.name}: {done['status']}, {done['seconds']:.0f}"
            f" s{'; ' + done['reason'][:300] if done['reason'] else ''}",
            flush=True,
        )


def run_step(step: Step, rehearse: bool, limit: float) -> dict:
    """Run a step in a process of its own, which is killed after `limit` seconds. Returns its
    status, reason, result, proved paths and seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix=f"tempflow-gpu-{step.name}-", ignore_cleanup_errors=True
    ) as folder:
        file, log = Path(folder) / "findings.json", Path(folder) / "log.txt"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command(step, file, rehearse),
                cwd=ROOT,
                env=_environment(rehearse),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_all(process)
        done = (
            json.loads(file.read_text())
            if file.exists()
            else {"status": "running", "result": {}, "proved": []}
        )
        if status is None:
            done |= {"status": "timed out", "reason": f"ended after {limit:.0f} s"}
        elif done["status"] == "running":
            how = (
                f"killed by {signal.Signals(-status).name}"
                if status < 0
                else f"exit status {status}"
            )
            done |= {"status": "failed", "reason": f"its process ended without a result ({how})"}
        if done["status"] not in GOOD:
            done["output"] = log.read_text(errors="replace")[-TAIL:]
    return done | {"seconds": round(time.monotonic() - started, 1)}


def command(step: Step, file: Path, rehearse: bool) -> list[str]:
    """The command line of a step's process, which writes its findings to `file`."""
    return [
        sys.executable,
        __file__,
        "--step",
        step.name,
        str(file),
        *(["--rehearse"] if rehearse else []),
    ]


def end_all(process: subprocess.Popen) -> None:
    """Kill what a step has left: its process, that process's descendants, and orphans in its
    session."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    for one in below:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(rehearse: bool) -> dict:
    """The environment of a step's process: it never asks the hub, and a rehearsal sees no GPU, even
    if there is one."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return found | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if rehearse else found


def _identify(report: Report, facts: dict, args: argparse.Namespace) -> None:
    """Name the report after the card, which the first step finds."""
    report.head |= {
        "card": facts.get("card", "unknown card"),
        "versions": facts.get("versions", {}),
    }
    slug = re.sub(r"[^A-Za-z0-9]+", "-", report.head["card"]).strip("-")
    folder, word = (
        (Path(tempfile.gettempdir()), "rehearsal")
        if args.rehearse
        else (ROOT / "benchmarks/results", "gpu")
    )
    report.file = args.out or folder / f"{word}-{slug}-{report.head['date']}.json"
    report.write()


def chosen(names: list[str] | None) -> list[Step]:
    """The steps of --only in their usual order, after the first step, which names the card; without
    --only all steps."""
    unknown = [name for name in names or () if name not in BY_NAME]
    if unknown:
        raise UserError(
            f"--only: no step is named {', '.join(unknown)}; there are {', '.join(BY_NAME)}"
        )
    return [step for step in STEPS if not names or step.name in names or step is STEPS[0]]


def main() -> int:
    args = parse_arguments()
    if args.step:
        return _be_a_step(*args.step, args.rehearse)
    steps = chosen(args.only)
    if not args.rehearse:
        check_gpu()
    if not args.rehearse and not uses_gpu():
        raise UserError("no CUDA GPU is usable here; --rehearse runs every step's code on the CPU")
    report = Report(
        date=str(date.today()), command=sys.argv, rehearsed=args.rehearse, minutes=args.minutes
    )
    run_steps(steps, args, report)
    print(f"{report.file}\n{report.write_page()}")
    if not args.rehearse and report.proved:
        hardware.write(
            hardware.upgraded(
                hardware.load(), report.proved, report.head["card"], report.head["date"]
            )
        )
        print(f"{hardware.FILE}; now: python docs/make_hardware_table.py")
    return 0 if all(step["status"] in GOOD for step in report.steps) else 1


def _be_a_step(name: str, file: str, rehearse: bool) -> int:
    """The main function of a step's process."""
    cli.quiet_libraries()
    from gpu_steps.context import Context

    Context(Path(file), rehearse).run(BY_NAME[name].load())
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time for everything (default 10)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STEP",
        help=f"run only these steps, of {', '.join(BY_NAME)}; the first one always runs",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run the steps' code on the CPU at tiny sizes"
    )
    parser.add_argument(
        "--out", type=Path, help="the report (JSON); the Markdown page is written beside it"
    )
    parser.add_argument("--step", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g}: must be above 0")
    return args


if __name__ == "__main__":
    cli.run(main)
