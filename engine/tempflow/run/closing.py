"""What the console says at the end of a run: a table of results, and the commands to run next.

The table repeats summary.json in words. It judges by the same limits and standard errors as the
report; nothing is computed here that the summary does not hold.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from tempflow.errors import counted
from tempflow.run.means import finite, gain_text, unpaired_gain, with_error
from tempflow.run.metrics import changes, drift_texts


def summary_rows(
    summary: dict, run_dir: Path, total: int | None = None, minutes: float | None = None
) -> list[tuple[str, str]]:
    """(label, text) of each line of the table; facts that the summary lacks have no line.

    Args:
        summary: content of summary.json.
        run_dir: where report.html is looked for.
        total: training.iterations, to say how many of them were done; None where not known.
        minutes: training.minutes, to say that it ended the run; None without a limit.
    """
    rows = [*_rewards(summary)]
    if drift := drift_texts(summary):
        rows.append(("drift from the base", ", ".join(drift)))
    if changed := changes(summary):
        rows.append(("what else changed", "; ".join(changed)))
    if (spent := finite(summary.get("minutes"))) is not None:
        rows.append(("training time", f"{spent:.1f} minutes, without evaluations"))
    if finite(summary.get("iterations")) is not None:
        rows.append(("iterations", _iterations(summary, total, minutes)))
    if finite(summary.get("images")) is not None:
        rows.append(("rewarded images", f"{int(summary['images']):,}"))
    if (run_dir / "report.html").exists():
        rows.append(("report", str(run_dir / "report.html")))
    return rows


def next_commands(run_dir: Path) -> list[tuple[str, str]]:
    """(what it gives, command) of what people do with a finished run."""
    run = shlex.quote(str(run_dir))
    return [
        (
            "images of the base and the tuned model",
            f"{_command('sample')} --run {run} --out images",
        ),
        ("a model that diffusers loads", f"{_command('export')} --run {run} --out model"),
    ]


def _command(name: str) -> str:
    """How to call a command from a shell in this folder."""
    # Outside a clone the scripts are not there; inside one, they need no installed commands.
    script = Path("engine") / f"{name}.py"
    return f"{_program('python')} {script}" if script.exists() else _program(f"tempflow-{name}")


def _program(name: str) -> str:
    """A program of this process's environment, with its path unless the user's shell finds it."""
    # `make train` trains in .venv without activating it, so a plain `python` would be another one.
    environment = Path(sys.prefix)
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return name
    if environment.is_relative_to(Path.cwd()):
        environment = environment.relative_to(Path.cwd())
    return shlex.quote(str(environment / "bin" / name))


def _rewards(summary: dict) -> list[tuple[str, str]]:
    base, tuned = finite(summary.get("base_reward")), finite(summary.get("tuned_reward"))
    rows = []
    if base is not None:
        rows.append(("base held-out reward", with_error(base, finite(summary.get("base_stderr")))))
    if tuned is not None:
        text = with_error(tuned, finite(summary.get("tuned_stderr")))
        if "scored" in summary:
            failed = f" ({summary['failed']} failed)" if summary["failed"] else ""
            text += f" on {counted(summary['scored'], 'prompt')}{failed}"
        rows.append(("tuned held-out reward", text))
    if base is not None and tuned is not None:
        rows.append(("gain", _gain(summary, base, tuned)))
    return rows


def _gain(summary: dict, base: float, tuned: float) -> str:
    gain = finite(summary.get("gain"))
    gain = unpaired_gain(base, tuned, summary.get("failed")) if gain is None else gain
    if gain is None:
        return "unknown: no prompt was scored before and after"
    return gain_text(gain, finite(summary.get("gain_stderr")))


def _iterations(summary: dict, total: int | None, minutes: float | None) -> str:
    done = int(summary["iterations"])
    if total is None or done >= total:
        return f"{done:,}"
    # A stop rule counts first: a run that it ended may have reached its time limit as well.
    limited = minutes is not None and (finite(summary.get("minutes")) or 0.0) >= minutes
    why = (
        f", stopped by {summary['stopped']}"
        if summary.get("stopped")
        else f", ended by training.minutes: {minutes:g}"
        if limited
        else ""
    )
    return f"{done:,} of {total:,}{why}"
