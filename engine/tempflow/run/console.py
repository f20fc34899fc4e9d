"""The terminal's view of a run: a live display at a terminal, one line per iteration anywhere else.

The live display has three parts: the bar of the iterations with the time left; training reward,
held-out reward with its gain over the base, and what needs attention; the bar of the current phase.
Each evaluation stays above it as text. Through a pipe (a log file, the deepspeed launcher on many
nodes, CI) control characters would be noise, so each iteration is one plain line. Only rank 0 is
enabled; a disabled console takes the same calls.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tempflow.errors import counted
from tempflow.run.closing import next_commands, summary_rows
from tempflow.run.means import finite, unpaired_gain, with_error
from tempflow.run.metrics import drift_texts

INDENT = "  "  # of the lines that a long text goes on in


class Console:
    """Progress of one run; a context manager around the training loop.

    Args:
        total_iterations: iterations at which the run ends.
        enabled: False on every rank but 0: nothing is printed.
        start: iterations done before this process (a resumed run).
        base_reward: held-out reward before training, where a checkpoint has it.
        minutes: training.minutes, which may end the run sooner.
        elapsed: seconds of training before this process.
        watched: names of the rewards whose held-out mean is shown beside the weighted one.
        output: a rich Console to write to; default: standard output.
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
        self.base_reward, self.watched, self.minutes = base_reward, watched, minutes
        # soft_wrap: rich would break a long path or command, which then cannot be copied
        self._out = output or RichConsole(highlight=False, soft_wrap=True)
        self.enabled, self.live = enabled, enabled and self._out.is_terminal
        self._elapsed = elapsed
        # seconds of training that this process may still take
        self._limit = math.inf if minutes is None else 60 * minutes - elapsed
        self._trained = 0.0  # seconds of training in this process
        self._began = time.monotonic()
        self._evaluation: dict = {}  # the row of the newest evaluation
        self._status: list[str] = []  # facts below the bar, with rich's markup
        self._build()

    def _build(self) -> None:
        self._iterations = Progress(
            TextColumn("[bold]iteration {task.fields[place]}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%{task.fields[of]}"),
            TextColumn("{task.fields[left]}"),
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
            of=self._of(),
            left="",
        )
        self._display = Live(
            get_renderable=self._lines,
            console=self._out,
            refresh_per_second=8,
            transient=True,  # the last state would stay above the summary, with its bars
        )

    def _lines(self) -> Group:
        # The numbers have lines of their own: beside the bar, 80 columns cut the time left off.
        # Packed here, because Live cuts a line that is too long instead of wrapping it.
        lines = packed(self._status, self._out.width, _cells) if self._status else []
        return Group(self._iterations, *map(Text.from_markup, lines), self._phases)

    def __enter__(self) -> Console:
        # The time left counts from here in a resumed run, which has no row of the base.
        self._began = time.monotonic()
        if self.live:
            self._display.start()
        return self

    def __exit__(self, *exc) -> None:
        if self.live:
            self._display.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None):
        """Show `name` (rollout, train, eval, checkpoint) while the block runs; yields
        advance(n=1), which counts towards `total`."""
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
        """Report one finished row of metrics.jsonl; the row of iteration 0 is the evaluation of the
        base."""
        self.done = int(metrics.get("iteration", self.done + 1))
        self._trained = (finite(metrics.get("time/elapsed")) or self._elapsed) - self._elapsed
        if self.done == self.start:
            # The base's evaluation comes once: the estimate of the time left starts after it.
            self._began = time.monotonic()
        evaluated = self._take(metrics)
        if self.live:
            self._iterations.update(
                self._task,
                completed=self._share(),
                place=self._place(),
                of=self._of(),
                left=self._left(),
            )
            self._status = self._status_parts(metrics)
            if evaluated:
                self._print_parts([f"iteration {self.done}:", *self._evaluation_parts()])
        elif self.enabled:
            self._print(INDENT.join(self._plain_parts(metrics, evaluated)))

    def final(self, metrics: dict) -> None:
        """Report the evaluation after the last iteration, whose row was reported before."""
        if self._take(metrics) and self.enabled:
            parts = [f"final evaluation, iteration {self.done}:", *self._evaluation_parts()]
            self._print_parts(parts)

    def note(self, text: str) -> None:
        """A text that stays, above the live display."""
        if self.enabled:
            self._print(_filled(text, self._out.width) if self.live else text)

    def summary(self, summary: dict, run_dir) -> None:
        """The table that ends the run, and the commands to run next."""
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
        for label, value in summary_rows(summary, Path(run_dir), self.total, self.minutes):
            table.add_row(label, escape(value))
        self._out.print(table)
        self._print("Next:")
        for gives, command in next_commands(Path(run_dir)):
            # Each command has a line of its own, so that a triple click copies it.
            self._print(f"  # {gives}")
            self._print(f"  {command}")

    def _print(self, text: str) -> None:
        # Without markup: paths and prompts may hold brackets.
        self._out.print(text, markup=False)

    def _print_parts(self, parts: list[str]) -> None:
        width = self._out.width if self.live else None
        for line in packed(parts, width):
            self._print(line)

    def _take(self, metrics: dict) -> bool:
        """Keep the row as the newest evaluation, if it holds one; whether it does."""
        evaluated = finite(metrics.get("eval/reward"))
        if evaluated is None:
            return False
        self._evaluation = metrics
        if self.base_reward is None and self.done == 0:
            self.base_reward = evaluated
        return True

    # ------------------------------------------------------------------------------------ texts
    def _status_parts(self, metrics: dict) -> list[str]:
        parts = []
        if (reward := finite(metrics.get("reward/mean"))) is not None:
            parts.append(f"reward [bold]{reward:.3f}[/]")
        if self._evaluation:
            parts.append(f"held-out [bold]{escape(self._heldout_text())}[/]")
        warnings = _troubles(metrics) + drift_texts(self._evaluation, beyond=True)
        return parts + [f"[yellow]{escape(text)}[/]" for text in warnings]

    def _plain_parts(self, metrics: dict, evaluated: bool) -> list[str]:
        parts = [f"iteration {self._place()}"]
        for label, key, form in (
            ("reward", "reward/mean", ".3f"),
            ("std", "reward/std", ".3f"),
            ("kl", "kl", ".2e"),
            ("grad", "grad_norm", ".2e"),
            ("seconds", "time/total", ".1f"),
        ):
            if (value := finite(metrics.get(key))) is not None:
                parts.append(f"{label} {value:{form}}")
        if left := self._left():
            parts.append(left)
        parts += _troubles(metrics)
        return parts + (self._evaluation_parts() if evaluated else [])

    def _evaluation_parts(self) -> list[str]:
        """The newest evaluation: reward, how many images it is made of, watched rewards, drift."""
        drift = drift_texts(self._evaluation) if self._of_trained() else []  # the base has none
        return [
            f"held-out {self._heldout_text()}",
            *_made_of(self._evaluation),
            *self._watched_texts(),
            *drift,
        ]

    def _watched_texts(self) -> list[str]:
        texts = []
        for name in self.watched:
            value = finite(self._evaluation.get(f"eval/{name}"))
            stderr = finite(self._evaluation.get(f"eval/{name}/stderr"))
            failed = self._evaluation.get(f"eval/{name}/failed")
            shown = [] if value is None else [with_error(value, stderr)]
            shown += [f"({failed} failed)"] if failed else []
            texts += [" ".join([name, *shown])] if shown else []
        return texts

    def _of_trained(self) -> bool:
        """Whether the newest evaluation is of a trained model, not of the base."""
        return int(self._evaluation.get("iteration", self.done)) > 0

    def _heldout_text(self) -> str:
        """The newest held-out reward with its gain over the base: prompt by prompt where that was
        measured, else the difference of the two means."""
        heldout = float(self._evaluation["eval/reward"])
        text = with_error(heldout, finite(self._evaluation.get("eval/reward/stderr")))
        gain = finite(self._evaluation.get("eval/gain"))
        stderr = finite(self._evaluation.get("eval/gain/stderr"))
        if gain is None and self.base_reward is not None and self._of_trained():
            gain = unpaired_gain(self.base_reward, heldout, self._evaluation.get("eval/failed"))
        return text if gain is None else f"{text} ({with_error(gain, stderr, '+')})"

    def _place(self) -> str:
        return f"{self.done:>{len(str(self.total))}}/{self.total}"

    def _of(self) -> str:
        """What the percentage is of, where it is not of the iterations."""
        if self.minutes is None or self._timed() <= self.done / self.total:
            return ""
        return f" of {counted(self.minutes, 'minute')}"

    def _left(self) -> str:
        left = self._seconds_left()
        return "" if left is None else f"left {duration(left)}"

    # ------------------------------------------------------------------------------------ time
    def _timed(self) -> float:
        """Share of training.minutes that has passed, over all processes of the run."""
        whole = self._elapsed + self._limit
        return (self._elapsed + self._trained) / whole if whole > 0 else 1.0

    def _share(self) -> float:
        """How far the run is, 0 to 1: by iterations, or by training.minutes where that ends the run
        sooner."""
        return min(1.0, max(self.done / self.total, self._timed()))

    def _seconds_left(self) -> float | None:
        """By iterations, or by training.minutes where that ends the run sooner; evaluations are
        assumed to take as large a share of the time as so far. None where there is no estimate."""
        finished = self.done - self.start
        if finished <= 0 or self.done >= self.total or self._trained >= self._limit:
            return None
        # Shares of what this process has to do: the pace of an earlier one (another machine, an
        # interrupted night) says nothing about this one.
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


def packed(parts: list[str], width: int | None, length: Callable[[str], int] = len) -> list[str]:
    """The parts in as few lines of `width` characters as hold them, whole; None: in one line.
    length: of a line as it is shown."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = INDENT.join([lines[-1], part])
        if width is None or length(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(INDENT + part)
    return lines


def _cells(line: str) -> int:
    return Text.from_markup(line).cell_len


def _filled(text: str, width: int) -> str:
    """Broken between words, and only there: a path longer than a line can then still be copied."""
    return textwrap.fill(
        text, width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )


def _made_of(metrics: dict) -> list[str]:
    """How many images an evaluation scored, and how many failed."""
    if "eval/scored" not in metrics:
        return []
    return [f"{metrics['eval/scored']} scored, {metrics['eval/failed']} failed"]


def _troubles(metrics: dict) -> list[str]:
    """What in an iteration's row needs attention."""
    texts = []
    for key, text in (("reward/failed", "rewards failed"), ("updates/skipped", "updates skipped")):
        if count := finite(metrics.get(key)):
            texts.append(f"{count:.0f} {text}")
    return texts
