"""What a run leaves behind while it goes on: metrics.jsonl, samples, trackers, the console and the
report, all from rank 0."""

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
        run_dir: claimed before.
        report: draws the run so far and returns the file it wrote; called on rank 0 after each
            evaluation.
        main: whether this is rank 0; elsewhere nothing is written or printed.

    Raises UserError for settings of trackers that cannot work, before a model is loaded.
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
        """Print a line, above the progress bars where there are any."""
        if self.main:
            self.console.note(text) if self.console else print(text)

    def begin(self, reached: int, console: Console) -> None:
        """Open the records; rows past the iteration `reached` are of a run that never got to a
        checkpoint, and are dropped."""
        self.console = console
        self.trackers.begin(after=reached)
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
        """The rows on record."""
        return read_metrics(self.run_dir) if self.main else []

    def record(self, metrics: dict) -> None:
        """Write one row; after an evaluation the report is drawn anew."""
        if not self.main:
            return
        self.byproducts.attempt(METRICS_FILE, self._log.append, metrics)
        self.trackers.log(metrics)
        self.console.iteration(metrics)
        if "eval/reward" in metrics:
            self.byproducts.attempt("report.html", self._report, self.run_dir)
        self._last_row = metrics

    def merge_into_last_row(self, iteration: int, final: dict) -> None:
        """The final evaluation belongs to the last iteration, which is on record already unless its
        row was lost."""
        if not self.main:
            return
        last = self._last_row or next(reversed(read_metrics(self.run_dir)), {})
        kept = last.get("iteration") == iteration
        row = {"iteration": iteration, **(last if kept else {}), **final}
        self.byproducts.attempt(
            METRICS_FILE, self._log.replace_last if kept else self._log.append, row
        )
        self.trackers.log({"iteration": iteration, **final})
        # Not `iteration`: that would print the row a second time.
        self.console.final(row)

    def samples(self, scored: evaluation.Scored, prompts, facts: dict) -> None:
        """Write an evaluation's images."""
        self.byproducts.attempt("samples", self._samples, scored, prompts, facts)

    def _samples(self, scored, prompts, facts) -> None:
        self.trackers.samples(evaluation.replace_samples(self.run_dir, scored, prompts, facts))

    def finish(self, summary: dict) -> None:
        """Write the summary and the last report, and show where they are."""
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
