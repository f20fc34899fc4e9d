"""Early stopping: one metric, followed over a run's evaluations.

The rule keeps nothing but what the evaluations on record say, so a resumed run reads it off
metrics.jsonl: it goes on exactly where it was, also under a rule that was changed in between.
"""

from __future__ import annotations

import math

from tempflow.config import Stop


def is_evaluation(row: dict, every: int) -> bool:
    """Whether a row of metrics.jsonl holds one of the run's regular evaluations; the last one comes
    when the run ends."""
    return "eval/reward" in row and row["iteration"] % every == 0


class StopRule:
    """Call `observe` with each evaluated row of metrics, in order."""

    def __init__(self, rule: Stop):
        self.rule = rule
        self.best, self.best_at, self.waited = -math.inf, 0, 0

    def observe(self, row: dict) -> str | None:
        """Why the run should stop after this evaluation, or None. A row whose metric is missing or
        NaN is ignored."""
        value = row.get(self.rule.metric)
        if value is None or not math.isfinite(value):
            return None
        name = f"eval.stop: {self.rule.metric} {value:.4g}"
        if self.rule.below is not None and value < self.rule.below:
            return f"{name} is below {self.rule.below:g}"
        if self.rule.above is not None and value > self.rule.above:
            return f"{name} is above {self.rule.above:g}"
        if value > self.best + self.rule.min_delta:
            self.best, self.best_at, self.waited = value, row["iteration"], 0
            return None
        self.waited += 1
        if self.rule.patience is not None and self.waited >= self.rule.patience:
            return (
                f"{name}, no better than {self.best:.4g} at iteration {self.best_at} for"
                f" {self.waited} evaluations"
            )
        return None

    def replay(self, rows: list[dict], every: int) -> str | None:
        """Observe the evaluations on record; returns what `observe` said of the last of them."""
        reason = None
        for row in rows:
            if is_evaluation(row, every):
                reason = self.observe(row)
        return reason
