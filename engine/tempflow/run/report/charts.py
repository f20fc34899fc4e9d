"""The numbers behind the report's charts, as charts.js draws them.

A chart is {kind, title, help, series, ...}; a series is {name, style, frame, y, error}, and its x are the
columns of its frame: {iteration, minutes, images, forwards}, between which the page switches. Long runs are
averaged over equal stretches of iterations, so a report stays small and every iteration still
counts; evaluations are few and kept as they are.
"""

from __future__ import annotations

import re
from typing import Iterable

from tempflow.run.metrics import DIVERSITY, DRIFTS, SIGNAL, TRAINING, Metric, describe
from tempflow.run.report.run import Run, number

FINE, COARSE = 600, 120
MADE_OF = re.compile(r"eval/.*(stderr|scored|failed)$")  # stand beside the means that they are of
SPREAD = re.compile(r"reward_std/step_(\d+)$")
COUNTS = ("failed", "updates/skipped", "not_finite")  # ends of the keys of counts
COST = [("forwards/rollout", "rollout"), ("forwards/train", "training")]
CLOCKS = {"time/total", "time/elapsed"}
WORKERS = {"time/reward_busy"}  # spent in other processes while the rollout goes on
# phases that time/total, the training of an iteration, leaves out
BESIDE_TOTAL = {"eval", "checkpoint"}


def frames(run: Run) -> dict:
    """The x columns: every row ("fine", averaged in long runs), few columns ("coarse"), evaluations
    ("eval")."""
    columns = {
        "iteration": [row["iteration"] for row in run.rows],
        "minutes": run.minutes,
        "images": run.images,
        "forwards": run.forwards,
    }
    evaluated = [iteration for iteration, _ in run.heldout]
    at = [{"iteration": iteration, **run.at(iteration)} for iteration in evaluated]
    return {
        "fine": {key: thin(values, FINE, _last) for key, values in columns.items()},
        "coarse": {key: _coarse(run, values, _last) for key, values in columns.items()},
        "eval": {key: [spent[key] for spent in at] for key in columns},
    }


def thin(values: list, limit: int, pick=None) -> list:
    """At most `limit` values: the means of equal stretches, gaps left out, or what `pick` makes of
    a stretch."""
    stride = max(1, -(-len(values) // limit))
    if stride == 1:
        return values
    return [(pick or mean)(values[n : n + stride]) for n in range(0, len(values), stride)]


def mean(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def smooth(values: list, width: int) -> list:
    """Centred running mean over `width` values; a gap stays one and counts in no mean."""
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
    width = max(1, len(training) // 15)
    if _any(training):
        series.append(line("training", smooth(training, width), "second"))
        if width > 1:
            series.append(line("training, each iteration", training, "faint", tip=False))
    if not series:
        return None
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


def breakdown_chart(run: Run) -> dict | None:
    """Held-out rewards by name, else training rewards by name, where there is more than one."""
    for prefix, frame in (("eval/", "held-out"), ("reward/", "training")):
        names = [
            key
            for key in run.keys
            if key.startswith(prefix) and key[len(prefix) :] in (run.config.get("rewards") or {})
        ]
        if len(names) > 1:
            errors = ", with their standard errors" if f"{names[0]}/stderr" in run.keys else ""
            series = [
                line(
                    _labelled(run, key[len(prefix) :]),
                    run.column(key),
                    f"c{n % 8} {'bridge dots' if prefix == 'eval/' else ''}",
                    error=run.column(f"{key}/stderr") if prefix == "eval/" else None,
                )
                for n, key in enumerate(names)
            ]
            return {
                "kind": "line",
                "title": "Rewards by name",
                "help": f"Means of the {frame} rewards, unweighted{errors}.",
                "series": series,
            }
    return None


def training_charts(run: Run) -> list[dict]:
    return small_charts(run, TRAINING)


def signal_charts(run: Run) -> list[dict]:
    return small_charts(run, (*SIGNAL, describe("eval/failed")))  # type: ignore[arg-type]  # the key is in the table


def drift_charts(run: Run) -> list[dict]:
    """How far held-out images are from the base's, each with its limit, or the bound at which the
    run would stop."""
    if len(run.heldout) < 2:
        return []
    charts = small_charts(run, DRIFTS)
    for chart in charts:
        metric = describe(chart["key"])
        if metric and metric.limit is not None:
            chart["level"] = {"name": "limit", "y": metric.limit}
    return _with_bounds(run, charts)


def guard_charts(run: Run) -> list[dict]:
    """Held-out watched rewards and the diversity of rollouts, with the bound at which the run would
    stop."""
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


def _labelled(run: Run, name: str) -> str:
    return f"{name} (watched)" if name in run.watched else name


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
    """(phase, seconds per row) for every time/... metric, and what the total leaves over as
    "other"."""
    phases = [
        (key.removeprefix("time/"), run.column(key))
        for key in run.keys
        if key.startswith("time/") and key not in CLOCKS | WORKERS
    ]
    phases.sort(key=lambda phase: phase[0] in BESIDE_TOTAL)
    if not phases or "time/total" not in run.keys:
        return phases
    spent = [
        sum(values[n] or 0 for name, values in phases if name not in BESIDE_TOTAL)
        for n in range(len(run.rows))
    ]
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
            "Standard deviation of the rewards that one branch step's noise makes: where decisions"
            " matter."
        ),
    }


def other_charts(run: Run) -> list[dict]:
    """A small chart for every metric that no other chart shows, under its key."""
    shown = {metric.key for metric in (*TRAINING, *SIGNAL, *DIVERSITY, *DRIFTS)} | {
        key for key, _ in COST
    }
    shown |= {"iteration", "images", "images/total", "reward/mean", "eval/reward"} | {
        f"eval/{name}" for name in run.watched
    }
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
    style = "main" if len(known) > 0.8 * len(values) else "main bridge dots"
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
    """A help text of the table of metrics as a sentence."""
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
    """A series of a chart. tip: whether the pointer's box names its values. pick: what stands for a
    stretch of a long run; None: its mean. error: standard errors of the values."""
    y = _rounded(thin(values, FINE, pick))
    alone = " dots" if sum(value is not None for value in y) == 1 else ""
    found = {"name": name, "style": style + alone, "frame": frame, "tip": tip, "y": y}
    errors = _rounded(thin(error, FINE)) if error else []
    return found | ({"error": errors} if _any(errors) else {})


def _last(stretch: list):
    return stretch[-1]


def _largest(stretch: list) -> float | None:
    return max((value for value in stretch if value is not None), default=None)


def _coarse(run: Run, values: list, pick=None) -> list:
    """Few columns; iteration 0 is no training and would be an empty one."""
    return thin(
        [value for row, value in zip(run.rows, values) if row["iteration"] > 0], COARSE, pick
    )


def _rounded(values: list) -> list:
    return [None if value is None else float(f"{value:.5g}") for value in values]


def _running_sum(values: list) -> list:
    total, out = 0.0, []
    for value in values:
        total += value or 0
        out.append(total)
    return out


def _any(values: list) -> bool:
    return any(value is not None for value in values)
