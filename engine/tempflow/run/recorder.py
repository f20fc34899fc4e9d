"""Everything that a run writes while it trains: metrics.jsonl, samples, trackers, the console and
the report, all from rank 0.

Recorder is the one object that training talks to. What a run can do without is attempted through
`ByProducts`, so that an error there does not end the run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

from tempflow.config import Config
from tempflow.errors import RankError
from tempflow.run import evaluation
from tempflow.run.byproducts import ByProducts
from tempflow.run.console import Console
from tempflow.run.logs import METRICS_FILE, MetricsLog, read_metrics, write_atomic
from tempflow.run.trackers import Trackers


class Recorder:
    """The records of one run directory.

    Args:
        config: of the run.
        run_dir: the run directory, claimed.
        report: writes the report of the run so far and returns its path; called on rank 0 after
            each evaluation.
        main: whether this is rank 0; elsewhere nothing is written or printed.

    Raises:
        UserError: for settings of trackers that cannot work, before a model is loaded.
    """

    def __init__(
        self, config: Config, run_dir: Path, report: Callable[[Path], Path], main: bool = True
    ):
        self.config, self.run_dir, self.main, self._report = config, run_dir, main, report
        self.byproducts = ByProducts()
        chosen = config.logging
        asked: dict[str, Any] = (
            {"tensorboard": chosen.tensorboard, "wandb": chosen.wandb} if main else {}
        )
        self.trackers = Trackers(run_dir, **asked, byproducts=self.byproducts)
        self.console: Console = None  # type: ignore[assignment]  # `begin` gives it
        self._log: MetricsLog = None  # type: ignore[assignment]  # `begin` opens it, on rank 0
        self._last_row: dict | None = None

    def note(self, text: str) -> None:
        """Print a line, above the progress bars if they are shown."""
        if self.main:
            self.console.note(text) if self.console else print(text)

    def begin(self, reached: int, console: Console) -> None:
        """Open the records.

        Args:
            reached: the iteration of the checkpoint that is resumed from, -1 for a new run. Rows
                after it are dropped: they are of iterations that this run repeats.
            console: takes every row from now on.

        Raises:
            RankError: where metrics.jsonl cannot be written.
        """
        self.console = console
        self.trackers.begin(after=reached)  # without trackers, as on other ranks, it does nothing
        if not self.main:
            return
        try:
            self._log = MetricsLog(self.run_dir)
            self._log.truncate_after(reached)
        except OSError as error:
            raise RankError(
                f"{self.run_dir / METRICS_FILE} cannot be written: {error.strerror}"
            ) from None

    def close(self) -> None:
        if self._log:
            self._log.close()
        if self.main:
            self.trackers.close()

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl so far; [] on ranks other than 0."""
        return read_metrics(self.run_dir) if self.main else []

    def record(self, metrics: dict) -> None:
        """Write one row of metrics; with an evaluation in it, the report is written again."""
        if not self.main:
            return
        self.byproducts.attempt(METRICS_FILE, self._log.append, metrics)
        self.trackers.log(metrics)
        self.console.iteration(metrics)
        # Not for each iteration: a report with its images takes seconds.
        if "eval/reward" in metrics:
            self.byproducts.attempt("report.html", self._report, self.run_dir)
        self._last_row = metrics

    def merge_into_last_row(self, iteration: int, final: dict) -> None:
        """Add the final evaluation to the row of the last iteration.

        Args:
            iteration: the last one.
            final: the metrics of the evaluation.
        """
        if not self.main:
            return
        # A resumed run that had no iteration left to do reads its last row from the file.
        last = self._last_row or next(reversed(read_metrics(self.run_dir)), {})
        # Without the row (a full disk lost it) the evaluation becomes a row of its own.
        kept = last.get("iteration") == iteration
        row = {"iteration": iteration, **(last if kept else {}), **final}
        self.byproducts.attempt(
            METRICS_FILE, self._log.replace_last if kept else self._log.append, row
        )
        self.trackers.log({"iteration": iteration, **final})
        # Not `iteration`: that would print the row a second time.
        self.console.final(row)

    def samples(self, scored: evaluation.Scored, prompts, facts: dict) -> None:
        """Write an evaluation's images. facts: what samples.json says about all of them."""
        self.byproducts.attempt("samples", self._samples, scored, prompts, facts)

    def _samples(self, scored, prompts, facts) -> None:
        self.trackers.samples(evaluation.replace_samples(self.run_dir, scored, prompts, facts))

    def finish(self, summary: dict) -> None:
        """Write summary.json and the last report, and print where the report is."""
        if not self.main:
            return
        self.byproducts.attempt(
            "summary.json",
            write_atomic,
            self.run_dir / "summary.json",
            json.dumps(summary, indent=1),
        )
        if report := self.byproducts.attempt("report.html", self._report, self.run_dir):
            self.note(f"report: {report}")
