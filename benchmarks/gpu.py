"""What a GPU can tell about this engine in ten minutes, one step after another: memory,
correctness, speed, and what breaks.

    python benchmarks/gpu.py [--minutes N] [--only STEP ...] [--out FILE]
    python benchmarks/gpu.py --rehearse [--only STEP ...]

The steps are in gpu_steps/, cheapest knowledge first. Each has a process of its own and a time
limit; one that fails, runs out of time or of memory is recorded with its reason, and the next goes
on. When --minutes (10; enough on an H100) is short, the last steps are dropped; when it is long,
all get more. Needs one CUDA GPU, no network, and no weights but the small model's: FLUX.1-dev's are
random ones made on the card. Results go to benchmarks/results/gpu-CARD-DATE.json as they come, with
a page of Markdown at the end, and what has run rightly to benchmarks/results/hardware.json, from
which `python docs/make_hardware_table.py` makes the README's table. --rehearse runs the code of
every step on a CPU at tiny sizes; it proves nothing about a GPU and says so.
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
    # last: kernels.py in this folder must not pass for Hugging Face's package
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
    """Seconds of each step that `seconds` are enough for, in order: the last ones are dropped, or
    all get more in proportion."""
    kept, total = {}, 0
    for step in steps:
        total += step.seconds
        if kept and total > seconds:
            break
        kept[step.name] = step.seconds
    scale = max(1.0, seconds / sum(kept.values())) if len(kept) == len(steps) else 1.0
    return {name: share * scale for name, share in kept.items()}


def run_steps(steps: list[Step], args: argparse.Namespace, report: Report) -> None:
    """All steps, each with what the ones before have left of the time, less what the ones after are
    promised."""
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
    """A step in a process of its own, ended after `limit` seconds: its status, reason, result,
    proved paths and seconds."""
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
    """What a step's process is started with; it writes its findings into `file`."""
    return [
        sys.executable,
        __file__,
        "--step",
        step.name,
        str(file),
        *(["--rehearse"] if rehearse else []),
    ]


def end_all(process: subprocess.Popen) -> None:
    """Kill what is left of a step: its process, all below it, and what has lost its parent in its
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
    """A rehearsal sees no GPU, even where there is one; nothing asks the hub."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return found | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if rehearse else found


def _identify(report: Report, facts: dict, args: argparse.Namespace) -> None:
    """Name the report after the card."""
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
    """The steps of --only in their order, after the first, which names the card; without it all."""
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
    """What a step's own process does."""
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
        help=f"some of the steps: {', '.join(BY_NAME)}; the first always runs",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run the steps' code on the CPU at tiny sizes"
    )
    parser.add_argument(
        "--out", type=Path, help="the report (JSON); the page of Markdown stands beside it"
    )
    parser.add_argument("--step", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g}: must be above 0")
    return args


if __name__ == "__main__":
    cli.run(main)
