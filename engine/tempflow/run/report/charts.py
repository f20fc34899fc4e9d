"""The numbers behind the report's charts, as charts.js draws them.

A chart is {kind, title, help, series, ...}, where kind is "line", "stack" or "heat". A series is
{name, style, frame, y, error}. Its x values are a column of its frame, {iteration, minutes, images,
forwards}; the page switches between these. Long runs are averaged over equal stretches of
iterations, so that a report stays small and every iteration counts. Evaluations are few and are all
kept.
"""

from __future__ import annotations

import re
from typing import Iterable, cast

from tempflow.run.metrics import DIVERSITY, DRIFTS, SIGNAL, TRAINING, Metric, describe
from tempflow.run.report.run import Run, number

FINE, COARSE = 600, 120  # most points of a line, most columns of a stack or heat map
# Shown with the mean that they belong to, as error bars or in the text, not as charts of their own.
MADE_OF = re.compile(r"eval/.*(stderr|scored|failed)$")
SPREAD = re.compile(r"reward_std/step_(\d+)$")
COUNTS = ("failed", "updates/skipped", "not_finite")  # ends of the keys of counts
COST = [("forwards/rollout", "rollout"), ("forwards/train", "training")]
CLOCKS = {"time/total", "time/elapsed"}
WORKERS = {"time/reward_busy"}  # spent in other processes during the rollout: no phase of the clock
# Phases that are not part of time/total, the time of training.
BESIDE_TOTAL = {"eval", "checkpoint"}


def frames(run: Run) -> dict:
    """The x values of all series, by frame: "fine" has a value for each row, or for each stretch of
    a long run; "coarse" has few; "eval" has one for each evaluation."""
    columns = {
        "iteration": [row["iteration"] for row in run.rows],
        "minutes": run.minutes,
        "images": run.images,
        "forwards": run.forwards,
    }
    evaluated = [iteration for iteration, _ in run.heldout]
    # From the summary's or a sample set's reward, an evaluation may be known whose row is lost.
    at = [{"iteration": iteration, **run.at(iteration)} for iteration in evaluated]
    # _last: a stretch's mean is drawn where the stretch ends, so that the last x is the run's end.
    return {
        "fine": {key: thin(values, FINE, _last) for key, values in columns.items()},
        "coarse": {key: _coarse(run, values, _last) for key, values in columns.items()},
        "eval": {key: [spent[key] for spent in at] for key in columns},
    }


def thin(values: list, limit: int, pick=None) -> list:
    """At most `limit` values.

    Args:
        values: with None for gaps.
        limit: more values than this are replaced by one for each of equal stretches.
        pick: what a stretch becomes; None: the mean of its values without the gaps.
    """
    stride = max(1, -(-len(values) // limit))
    if stride == 1:
        return values
    return [(pick or mean)(values[n : n + stride]) for n in range(0, len(values), stride)]


def mean(values: list) -> float | None:
    """The mean without the gaps; None where all are gaps."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def smooth(values: list, width: int) -> list:
    """Centered running mean over `width` values; a gap (None) stays a gap and is in no mean."""
    half = width // 2
    return [
        None if value is None else mean(values[max(0, n - half) : n + half + 1])
        for n, value in enumerate(values)
    ]


def reward_chart(run: Run) -> dict | None:
    """Held-out and training reward, with the base's held-out reward as a line to compare with."""
    series = []
    training = run.column("reward/mean")
    if run.heldout:
        evaluated = {
            "name": "held-out",
            "style": "main dots",
            "frame": "eval",
            "y": [y for _, y in run.heldout],
        }
        errors = [run.stderr(iteration) for iteration, _ in run.heldout]
        series.append(evaluated | ({"error": errors} if _any(errors) else {}))
    width = max(1, len(training) // 15)  # smooth enough to show a trend, at any length of the run
    if _any(training):
        series.append(line("training", smooth(training, width), "second"))
        if width > 1:
            series.append(line("training, each iteration", training, "faint", tip=False))
    if not series:
        return None
    # Only an evaluation at iteration 0 is of the base.
    base = run.heldout[0][1] if run.heldout and run.heldout[0][0] == 0 else None
    note = "Training: rewards of the rollouts, which explore with noise" + (
        f", running mean over {width} iterations." if _any(training) and width > 1 else "."
    )
    held = (
        "Held-out: fixed prompts and noise, ODE sampling, with the standard error over prompts. "
        if run.heldout
        else ""
    )
    return {
        "kind": "line",
        "title": "Reward",
        "help": held + note,
        "series": series,
        "height": 300,
        "level": {"name": "base", "y": base} if base is not None and len(run.heldout) > 1 else None,
    }


def breakdown_charts(run: Run) -> list[dict]:
    """A small chart for each reward that is trained on, held-out or else of the training, where
    there is more than one."""
    trained = [name for name in run.config.get("rewards") or {} if name not in run.watched]
    # With one reward this would repeat the reward chart.
    if len(trained) < 2:
        return []
    # Charts of their own and not lines of one: rewards have different scales, and on the axis of
    # the largest the others would look flat.
    for prefix, frame in (("eval/", "held-out"), ("reward/", "training")):
        errors = ", with its standard error" if f"{prefix}{trained[0]}/stderr" in run.keys else ""
        text = f"mean of this reward alone, unweighted{errors}"
        wanted = (Metric(f"{prefix}{name}", f"{name}, {frame}", text) for name in trained)
        if found := small_charts(run, wanted):
            return found
    return []


def training_charts(run: Run) -> list[dict]:
    """What the updates do: KL, clipping, gradient, loss, learning rate."""
    return small_charts(run, TRAINING)


def signal_charts(run: Run) -> list[dict]:
    """What the updates learn from: spread of rewards, skipped prompts, failures."""
    failed = cast(Metric, describe("eval/failed"))  # the key is in the table
    return small_charts(run, (*SIGNAL, failed))


def drift_charts(run: Run) -> list[dict]:
    """Charts of the drift metrics, each with its limit, or with the bound at which eval.stop would
    end the run."""
    if len(run.heldout) < 2:
        return []
    charts = small_charts(run, DRIFTS)
    for chart in charts:
        metric = describe(chart["key"])
        if metric and metric.limit is not None:
            chart["level"] = {"name": "limit", "y": metric.limit}
    return _with_bounds(run, charts)


def guard_charts(run: Run) -> list[dict]:
    """Charts of the watched rewards and of the rollouts' diversity, with the bound at which
    eval.stop would end the run."""
    watched = [
        Metric(
            f"eval/{name}", f"{name}, watched", "held-out mean of a reward that is not trained on"
        )
        for name in run.watched
    ]
    return _with_bounds(run, small_charts(run, (*watched, *DIVERSITY)))


def _with_bounds(run: Run, charts: list[dict]) -> list[dict]:
    rule = run.setting("eval", "stop") or {}
    for chart in charts:
        for side in ("below", "above"):
            if chart["key"] == rule.get("metric") and number(rule.get(side)) is not None:
                chart["level"] = {"name": f"stop {side}", "y": rule[side]}
    return charts


def small_charts(run: Run, wanted: Iterable[Metric]) -> list[dict]:
    """One line chart for each wanted metric that the run has."""
    return [
        _single(run, metric.key, metric.title, sentence(metric.help))
        for metric in wanted
        if metric.key in run.keys
    ]


def cost_charts(run: Run) -> list[dict]:
    """Seconds per phase of each iteration, and transformer forwards so far."""
    charts, phases = [], phase_columns(run)
    if phases:
        series = [
            line(name, _coarse(run, values), f"c{n % 8}", frame="coarse")
            for n, (name, values) in enumerate(phases)
        ]
        charts.append(
            {
                "kind": "stack",
                "title": "Seconds per iteration",
                "series": series,
                "from_zero": True,
                "help": "By phase; phases that overlap add up to more than the clock.",
            }
        )
    forwards = [
        line(name, _running_sum(run.column(key)), f"c{n % 8}")
        for n, (key, name) in enumerate(COST)
        if key in run.keys
    ]
    if forwards:
        charts.append(
            {
                "kind": "line",
                "title": "Transformer forwards so far",
                "series": forwards,
                "from_zero": True,
                "help": "As counted by the run; a backward is not counted as a forward.",
            }
        )
    return charts


def phase_columns(run: Run) -> list[tuple[str, list]]:
    """(phase, seconds per row) for every time/... metric, and the rest of time/total as "other"."""
    phases = [
        (key.removeprefix("time/"), run.column(key))
        for key in run.keys
        if key.startswith("time/") and key not in CLOCKS | WORKERS
    ]
    phases.sort(key=lambda phase: phase[0] in BESIDE_TOTAL)  # evaluation on top of the stack
    if not phases or "time/total" not in run.keys:
        return phases
    spent = [
        sum(values[n] or 0 for name, values in phases if name not in BESIDE_TOTAL)
        for n in range(len(run.rows))
    ]
    # max: phases that overlap, as rollout and decoding, can add up to more than the total.
    rest = [max(0.0, (total or 0) - known) for total, known in zip(run.column("time/total"), spent)]
    return phases + ([("other", rest)] if sum(rest) > 0.01 * sum(spent) else [])


def spread_columns(run: Run) -> list[tuple[int, list]]:
    """(branch step, reward spread per row), early steps first."""
    steps = [(int(match[1]), key) for key in run.keys if (match := SPREAD.match(key))]
    return [(step, run.column(key)) for step, key in sorted(steps)]


def spread_chart(run: Run) -> dict | None:
    """Heat map of the reward spread, branch step by iteration."""
    columns = spread_columns(run)
    if not columns or len(run.rows) < 2:
        return None
    series = [
        {"name": f"step {step}", "frame": "coarse", "y": _rounded(_coarse(run, values))}
        for step, values in columns
    ]
    return {
        "kind": "heat",
        "title": "Reward spread by branch step",
        "series": series,
        "help": (
            "Standard deviation of the rewards among the children of one branch step: large where the"
            " noise of the step decides about the reward."
        ),
    }


def other_charts(run: Run) -> list[dict]:
    """A small chart for every metric that no other chart shows, under its key."""
    shown = {metric.key for metric in (*TRAINING, *SIGNAL, *DIVERSITY, *DRIFTS)} | {
        key for key, _ in COST
    }
    # With charts of their own above, under other titles.
    shown |= {"iteration", "images", "images/total", "reward/mean", "eval/reward"} | {
        f"eval/{name}" for name in run.watched
    }
    shown |= {chart["key"] for chart in breakdown_charts(run)}
    return [
        _single(run, key, key, sentence(found.help) if (found := describe(key)) else "")
        for key in run.keys
        if key not in shown
        and not SPREAD.match(key)
        and not MADE_OF.match(key)
        and (key in WORKERS or not key.startswith("time/"))
    ]


def _single(run: Run, key: str, title: str, text: str) -> dict:
    values = run.column(key)
    known = [value for value in values if value is not None]
    # A metric of few rows (of evaluations, audits) has dots, and lines across its gaps.
    style = "main" if len(known) > 0.8 * len(values) else "main bridge dots"
    # The mean of a stretch would hide the outlier that a maximum is for.
    pick = _largest if "max" in key else None
    counts = key.endswith(COUNTS)
    return {
        "kind": "line",
        "title": title,
        "help": text,
        "key": key,
        "series": [line(title, values, style, pick=pick, error=run.column(f"{key}/stderr"))],
        # Not always: a learning rate or a reward near 100 would be a flat line at the top.
        "from_zero": counts or 0 <= min(known) <= 0.6 * max(known),
        # Half an image cannot fail; the means of a long run's stretches may lie between.
        "whole": counts,
    }


def sentence(text: str) -> str:
    """A help text from the table of metrics, as a sentence."""
    return f"{text[0].upper()}{text[1:]}."


def line(
    name: str,
    values: list,
    style: str,
    frame: str = "fine",
    tip: bool = True,
    pick=None,
    error: list | None = None,
) -> dict:
    """A series of a chart.

    Args:
        name: in the legend.
        values: one for each row, None for gaps.
        style: classes of style.css, which decide color, dashes and shape.
        frame: whose columns are the x values.
        tip: whether the box at the pointer shows its values.
        pick: what a stretch of a long run becomes; None: its mean.
        error: standard errors of the values.
    """
    y = _rounded(thin(values, FINE, pick))
    # A line needs two points: a single value would not be visible without a dot.
    alone = " dots" if sum(value is not None for value in y) == 1 else ""
    found = {"name": name, "style": style + alone, "frame": frame, "tip": tip, "y": y}
    errors = _rounded(thin(error, FINE)) if error else []
    return found | ({"error": errors} if _any(errors) else {})


def _last(stretch: list):
    return stretch[-1]


def _largest(stretch: list) -> float | None:
    return max((value for value in stretch if value is not None), default=None)


def _coarse(run: Run, values: list, pick=None) -> list:
    """At most COARSE values; without iteration 0, which has no training and would be empty."""
    return thin(
        [value for row, value in zip(run.rows, values) if row["iteration"] > 0], COARSE, pick
    )


def _rounded(values: list) -> list:
    # Five digits are finer than a pixel, and keep the page small.
    return [None if value is None else float(f"{value:.5g}") for value in values]


def _running_sum(values: list) -> list:
    total, out = 0.0, []
    for value in values:
        total += value or 0  # a row without the count, as the base's, adds nothing
        out.append(total)
    return out


def _any(values: list) -> bool:
    return any(value is not None for value in values)
