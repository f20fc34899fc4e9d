"""The terminal's view of a run: a live display at a terminal, one line per iteration anywhere else.

Live: the iterations' bar with reward, held-out reward against the base and the time left, and below
it the bar of the current phase. Through a pipe (a log file, the deepspeed launcher on many nodes,
CI) control characters would be noise, so each iteration is one plain line. Only rank 0 is enabled;
a disabled console takes the same calls.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tempflow.run.means import gain_text, unpaired_gain, with_error
from tempflow.run.metrics import changes, drift_texts


class Console:
    """Progress of one run; a context manager around the training loop.

    total_iterations  iterations the run ends at
    enabled           False on every rank but 0: nothing is printed
    start             iterations done before this process (a resumed run)
    minutes           training.minutes, where the run ends sooner by it
    elapsed           seconds of training before this process
    base_reward       held-out reward before training, where it is already known
    watched           names of rewards whose held-out mean is shown beside it
    output            a rich Console to write to (default: stdout)
    """

    def __init__(
        self,
        total_iterations: int,
        enabled: bool = True,
        *,
        start: int = 0,
        base_reward: float | None = None,
        minutes: float | None = None,
        elapsed: float = 0.0,
        watched: Sequence[str] = (),
        output: RichConsole | None = None,
    ):
        self.total, self.start, self.done = total_iterations, start, start
        self.base_reward, self.watched = base_reward, watched
        self.heldout: float | None = None
        self._out = output or RichConsole(highlight=False, soft_wrap=True)
        self.enabled, self.live = enabled, enabled and self._out.is_terminal
        self._limit, self._elapsed = (
            (math.inf if minutes is None else 60 * minutes - elapsed),
            elapsed,
        )
        self._trained = 0.0  # seconds of training in this process
        self._began = time.monotonic()
        self._evaluation: dict = {}  # the row of the newest evaluation
        self._build()

    def _build(self) -> None:
        self._iterations = Progress(
            TextColumn("[bold]iteration {task.fields[place]}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[status]}"),
            console=self._out,
        )
        self._phases = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=self._out,
        )
        self._task = self._iterations.add_task(
            "",
            total=1.0,
            completed=self._share(),  # type: ignore[arg-type]  # rich takes fractions
            place=self._place(),
            status="",
        )
        self._display = Live(
            Group(self._iterations, self._phases),
            console=self._out,
            refresh_per_second=8,
            transient=True,
        )

    def __enter__(self) -> Console:
        self._began = time.monotonic()
        if self.live:
            self._display.start()
        return self

    def __exit__(self, *exc) -> None:
        if self.live:
            self._display.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None):
        """Show `name` (rollout, reward, train, eval, checkpoint) while the block runs; yields
        advance(n=1)."""
        if not self.live:
            yield lambda n=1: None
            return
        task = self._phases.add_task(name, total=total, count="" if total is None else f"0/{total}")

        done = 0

        def advance(n: int = 1) -> None:
            nonlocal done
            done += n
            self._phases.update(
                task, completed=done, count=f"{done:g}" if total is None else f"{done:g}/{total}"
            )

        try:
            yield advance
        finally:
            self._phases.remove_task(task)

    def iteration(self, metrics: dict) -> None:
        """Report one finished row of metrics.jsonl; a row of iteration 0 is the evaluation of the
        base."""
        self.done = int(metrics.get("iteration", self.done + 1))
        self._trained = (_finite(metrics.get("time/elapsed")) or self._elapsed) - self._elapsed
        if self.done == self.start:
            self._began = time.monotonic()
        evaluated = _finite(metrics.get("eval/reward"))
        if evaluated is not None:
            self.heldout, self._evaluation = evaluated, metrics
            if self.base_reward is None and self.done == 0:
                self.base_reward = evaluated
        if self.live:
            self._iterations.update(
                self._task,
                completed=self._share(),
                place=self._place(),
                status=self._status(metrics),
            )
        if self.live and evaluated is not None:
            parts = [
                f"iteration {self.done}: held-out reward {self._heldout_text()}",
                *_made_of(metrics),
                *self._watched_texts(metrics),
            ]
            self.note("  ".join([*parts, *self._drift_texts(metrics)]))
        elif self.enabled and not self.live:
            self._print(self._plain_line(metrics, evaluated is not None))

    def note(self, text: str) -> None:
        """One line of text that stays, above the live display."""
        if self.enabled:
            self._print(text)

    def summary(self, summary: dict, run_dir) -> None:
        """The final table: what was gained, what it took, where the report is, and what to run
        next."""
        if not self.enabled:
            return
        table = Table(
            title=f"Run {escape(Path(run_dir).name)}",
            show_header=False,
            title_justify="left",
            title_style="bold",
        )
        table.add_column(no_wrap=True)
        table.add_column(justify="left", overflow="fold")
        for label, value in _summary_rows(summary, Path(run_dir)):
            table.add_row(label, escape(value))
        self._out.print(table)
        self._print("Next:")
        quoted = shlex.quote(str(run_dir))
        self._print(
            f"  python engine/sample.py --run {quoted} --out images   (base and tuned, side by"
            " side)"
        )
        self._print(
            f"  python engine/export.py --run {quoted} --out model      (a model that diffusers"
            " loads)"
        )

    def _print(self, text: str) -> None:
        self._out.print(text, markup=False)

    def _status(self, metrics: dict) -> str:
        parts = []
        if (reward := _finite(metrics.get("reward/mean"))) is not None:
            parts.append(f"reward [bold]{reward:.3f}[/]")
        if self.heldout is not None:
            parts.append(f"held-out [bold]{self._heldout_text()}[/]")
        if (left := self._seconds_left()) is not None:
            parts.append(f"left {duration(left)}")
        return "  ".join(parts)

    def _plain_line(self, metrics: dict, evaluated: bool) -> str:
        parts = [f"iteration {self._place()}"]
        for label, key, form in (
            ("reward", "reward/mean", ".3f"),
            ("std", "reward/std", ".3f"),
            ("kl", "kl", ".2e"),
            ("grad", "grad_norm", ".2e"),
            ("seconds", "time/total", ".1f"),
        ):
            if (value := _finite(metrics.get(key))) is not None:
                parts.append(f"{label} {value:{form}}")
        if (left := self._seconds_left()) is not None:
            parts.append(f"left {duration(left)}")
        if evaluated:
            parts += [
                f"held-out {self._heldout_text()}",
                *_made_of(metrics),
                *self._watched_texts(metrics),
                *self._drift_texts(metrics),
            ]
        return "  ".join(parts)

    def _watched_texts(self, metrics: dict) -> list[str]:
        texts = []
        for name in self.watched:
            value, failed = _finite(metrics.get(f"eval/{name}")), metrics.get(f"eval/{name}/failed")
            shown = (
                []
                if value is None
                else [with_error(value, _finite(metrics.get(f"eval/{name}/stderr")))]
            )
            shown += [f"({failed} failed)"] if failed else []
            texts += [" ".join([name, *shown])] if shown else []
        return texts

    def _drift_texts(self, metrics: dict) -> list[str]:
        """How far an evaluation's images are from the base's; nothing of the base itself."""
        return drift_texts(metrics) if self.done > 0 else []

    def _heldout_text(self) -> str:
        """The newest held-out reward, and how far it is from the base's, prompt by prompt where
        that is known."""
        assert self.heldout is not None  # what calls this looks first
        text = with_error(self.heldout, _finite(self._evaluation.get("eval/reward/stderr")))
        gain, stderr = (
            _finite(self._evaluation.get(key)) for key in ("eval/gain", "eval/gain/stderr")
        )
        if gain is None and self.base_reward is not None and self.done > 0:
            gain = unpaired_gain(
                self.base_reward,
                self.heldout,
                self._evaluation.get("eval/failed"),
            )
        return text if gain is None else f"{text} ({with_error(gain, stderr, '+')})"

    def _place(self) -> str:
        return f"{self.done:>{len(str(self.total))}}/{self.total}"

    def _share(self) -> float:
        """How far the run is, 0 to 1: by iterations, or by training.minutes where that ends the run
        sooner."""
        trained = (
            (self._elapsed + self._trained) / (self._elapsed + self._limit)
            if self._elapsed + self._limit > 0
            else 1.0
        )
        return min(1.0, max(self.done / self.total, trained))

    def _seconds_left(self) -> float | None:
        """By iterations, or by training.minutes where that ends the run sooner; evaluations are
        taken to go on as they did.

        The base's evaluation comes once and is not counted: the clock starts at the row of
        iteration 0.
        """
        finished = self.done - self.start
        if finished <= 0 or self.done >= self.total or self._trained >= self._limit:
            return None
        share = max(finished / (self.total - self.start), self._trained / self._limit)
        return (time.monotonic() - self._began) * (1 - share) / share


def duration(seconds: float) -> str:
    """Seconds as people read them: 45s, 6m40s, 3h05m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def _made_of(metrics: dict) -> list[str]:
    """How many images an evaluation scored, and how many failed."""
    return (
        [f"{metrics['eval/scored']} scored, {metrics['eval/failed']} failed"]
        if "eval/scored" in metrics
        else []
    )


def _summary_rows(summary: dict, run_dir: Path) -> list[tuple[str, str]]:
    base, tuned = _finite(summary.get("base_reward")), _finite(summary.get("tuned_reward"))
    rows = []
    if base is not None:
        rows.append(("base held-out reward", with_error(base, _finite(summary.get("base_stderr")))))
    if tuned is not None:
        made_of = (
            f" on {summary['scored']} prompts ({summary['failed']} failed)"
            if "scored" in summary
            else ""
        )
        rows.append(
            (
                "tuned held-out reward",
                with_error(tuned, _finite(summary.get("tuned_stderr"))) + made_of,
            )
        )
    if base is not None and tuned is not None:
        gain = _finite(summary.get("gain"))
        gain = unpaired_gain(base, tuned, summary.get("failed")) if gain is None else gain
        none = "unknown: no prompt was scored before and after"
        rows.append(
            ("gain", none if gain is None else gain_text(gain, _finite(summary.get("gain_stderr"))))
        )
    if drift := drift_texts(summary):
        rows.append(("drift from the base", ", ".join(drift)))
    if changed := changes(summary):
        rows.append(("what changed beside it", "; ".join(changed)))
    if (minutes := _finite(summary.get("minutes"))) is not None:
        rows.append(("time", f"{minutes:.1f} minutes"))
    for label, key in (("iterations", "iterations"), ("rewarded images", "images")):
        if _finite(summary.get(key)) is not None:
            rows.append((label, f"{int(summary[key]):,}"))
    if (run_dir / "report.html").exists():
        rows.append(("report", str(run_dir / "report.html")))
    return rows


def _finite(value) -> float | None:
    if value is None or isinstance(value, str):
        return None
    value = float(value)
    return value if math.isfinite(value) else None
