"""Early stopping: one metric, followed over a run's evaluations.

The state of the rule follows from the evaluations in metrics.jsonl alone. A resumed run replays
them, so it continues exactly where it was, and also if eval.stop was changed in between.
"""

from __future__ import annotations

import math

from tempflow.config import Stop
from tempflow.errors import counted


def is_evaluation(row: dict, every: int) -> bool:
    """Whether a row of metrics.jsonl holds a regular evaluation, one at a multiple of `every`."""
    # An evaluation at another iteration was made because the run ended there. A run that goes
    # straight through lacks it, so a run that is resumed must not count it.
    return "eval/reward" in row and row["iteration"] % every == 0


class StopRule:
    """The rule of eval.stop. Call `observe` with each evaluated row of metrics, in order."""

    def __init__(self, rule: Stop):
        self.rule = rule
        self.best, self.best_at, self.waited = -math.inf, 0, 0

    def observe(self, row: dict) -> str | None:
        """Take one evaluation.

        Args:
            row: of metrics.jsonl. A row whose metric is missing or NaN is ignored.

        Returns:
            Why the run should stop after it, or None.
        """
        value = row.get(self.rule.metric)
        if value is None or not math.isfinite(value):
            return None
        name = f"eval.stop: {self.rule.metric} {value:.4g}"
        if self.rule.below is not None and value < self.rule.below:
            return f"{name} is below {self.rule.below:g}"
        if self.rule.above is not None and value > self.rule.above:
            return f"{name} is above {self.rule.above:g}"
        # min_delta: noise of an evaluation must not count as progress and reset the patience.
        if value > self.best + self.rule.min_delta:
            self.best, self.best_at, self.waited = value, row["iteration"], 0
            return None
        self.waited += 1
        if self.rule.patience is not None and self.waited >= self.rule.patience:
            return (
                f"{name}, no better than {self.best:.4g} at iteration {self.best_at} for"
                f" {counted(self.waited, 'evaluation')}"
            )
        return None

    def replay(self, rows: list[dict], every: int) -> str | None:
        """Observe the evaluations on record; returns what `observe` returned for the last one."""
        # An earlier reason to stop is forgotten: the run went on after it, under another rule.
        reason = None
        for row in rows:
            if is_evaluation(row, every):
                reason = self.observe(row)
        return reason
