"""The page that compares several runs: final numbers, curves in common charts, samples side by
side, and what differs between the configs.

It uses the script and style of a run's report. A run has the same color, dashes and shape in all
charts.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from tempflow.errors import UserError
from tempflow.run.logs import write_atomic
from tempflow.run.metrics import DIVERSITY, DRIFTS, Metric, describe
from tempflow.run.report import charts, comparable
from tempflow.run.report.page import Figures, axis_switch, fill, section
from tempflow.run.report.run import Run
from tempflow.run.report.samples import SHOWN, side
from tempflow.run.report.thumbnails import Thumbnails

# In the page's head: without it an existing file is not overwritten.
MARK = '<meta name="generator" content="tempflow-report">'
COST = ("time/total",)
UPDATES = ("kl", "clip_fraction", "grad_norm", "reward/std", "reward/zero_std_groups")


def write_comparison(folders: list[Path], out: Path) -> Path:
    """Write a page about several runs, and return its path.

    Args:
        folders: run directories, two to eight.
        out: a new file, or an older page of this function, which is replaced.

    Raises:
        UserError: for a folder without metrics, runs that were evaluated on different prompts, and
            an existing file that this function did not write.
    """
    runs = comparable.load_runs(folders)
    if out.exists() and not _is_ours(out):
        raise UserError(f"--out {out} exists and is no comparison page; choose another file")
    try:
        return write_atomic(out, render(runs))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _is_ours(out: Path) -> bool:
    if not out.is_file():
        return False
    with out.open("rb") as file:
        return MARK.encode() in file.read(2000)  # the head is at the top


def render(runs: dict[str, Run]) -> str:
    """The page as text. runs: by name."""
    figures = Figures()
    heldout = figures.html(_heldout_chart(runs), wide=True)

    def metrics(wanted) -> str:
        return figures.grid(_metric_charts(runs, wanted))

    body = [
        section("samples", "Samples", _samples(runs, Thumbnails())),
        section("drift", "Drift from the base", metrics(DRIFTS)),
        section("rewards", "Rewards", figures.grid(_reward_charts(runs))),
        section("updates", "Updates", metrics(_described(UPDATES)), metrics(DIVERSITY)),
        section("cost", "Cost", metrics(_described(COST))),
        section("differences", "What differs", _differences(runs)),
    ]
    return fill(
        title=f"{len(runs)} TempFlow-GRPO runs compared",
        kicker=f"TempFlow-GRPO runs {_named(runs)}",
        heading=comparable.headline(runs) + ".",
        top=_numbers(runs),
        switch=axis_switch(list(runs.values())),
        body=[f"<section>{heldout}</section>" if heldout else "", *body],
        data={"frames": _frames(runs), "charts": figures.drawn},
        source="the config.json, metrics.jsonl and samples of the runs",
        head=MARK,
    )


def _described(keys: tuple[str, ...]) -> list[Metric]:
    return [metric for key in keys if (metric := describe(key))]


def _named(runs: dict[str, Run]) -> str:
    return ", ".join(
        f'<strong class="named c{n}">{escape(name)}</strong>' for n, name in enumerate(runs)
    )


# ------------------------------------------------------------------------------------------- curves
def _frames(runs: dict[str, Run]) -> dict:
    """The frames of all runs: "fineN" and "evalN" for run number N."""
    found: dict[str, dict] = {}
    for n, run in enumerate(runs.values()):
        own = charts.frames(run)
        found |= {f"fine{n}": own["fine"], f"eval{n}": own["eval"]}
    return found


def _heldout_chart(runs: dict[str, Run]) -> dict | None:
    series = []
    for n, (name, run) in enumerate(runs.items()):
        if run.heldout:
            errors = [run.stderr(iteration) for iteration, _ in run.heldout]
            values = [value for _, value in run.heldout]
            series.append(charts.line(name, values, f"c{n} dots", frame=f"eval{n}", error=errors))
    text = "Fixed prompts and noise, ODE sampling, with the standard errors over prompts."
    if not comparable.same_rewards(runs):
        text += " The runs have different rewards, so their totals cannot be compared."
    return _chart("Held-out reward", text, series, height=300)


def _reward_charts(runs: dict[str, Run]) -> list[dict]:
    """Training reward, and each held-out reward by name where a run has several."""
    series = []
    for n, (name, run) in enumerate(runs.items()):
        values = run.column("reward/mean")
        # Smoothed alone: two noisy lines over each other could not be told apart.
        smoothed = charts.smooth(values, max(1, len(values) // 15))
        series.append(charts.line(name, smoothed, f"c{n}", frame=f"fine{n}"))
    text = "Rewards of the rollouts, which explore with noise; a running mean."
    found = [_chart("Training reward", text, series)]
    names = dict.fromkeys(
        reward for run in runs.values() for reward in run.config.get("rewards") or {}
    )
    if len(names) > 1:
        wanted = (Metric(f"eval/{name}", f"{name}, held-out", "its mean alone") for name in names)
        found += _metric_charts(runs, wanted)
    return [chart for chart in found if chart]


def _metric_charts(runs: dict[str, Run], wanted) -> list[dict]:
    """A chart for each metric that a run has, with the limit where it has one."""
    found = []
    for metric in wanted:
        series = []
        for n, (name, run) in enumerate(runs.items()):
            if metric.key in run.keys:
                values = run.column(metric.key)
                # Metrics of evaluations have few rows: dots, and lines across the gaps.
                sparse = sum(value is not None for value in values) < 0.8 * len(values)
                style = f"c{n} bridge dots" if sparse else f"c{n}"
                error = run.column(f"{metric.key}/stderr")
                series.append(charts.line(name, values, style, frame=f"fine{n}", error=error))
        chart = _chart(metric.title, charts.sentence(metric.help), series)
        if chart and metric.limit is not None:
            chart["level"] = {"name": "limit", "y": metric.limit}
        found.append(chart)
    return [chart for chart in found if chart]


def _chart(title: str, text: str, series: list[dict], **more) -> dict | None:
    # A run whose values are all missing would have a legend without a line.
    series = [one for one in series if any(value is not None for value in one["y"])]
    if not series:
        return None
    return {"kind": "line", "title": title, "help": text, "series": series, "legend": True, **more}


# ------------------------------------------------------------------------------------------- tables
def _numbers(runs: dict[str, Run]) -> str:
    return _table(runs, comparable.numbers(runs), "numbers", "Final numbers")


def _differences(runs: dict[str, Run]) -> str:
    rows = [
        (key, ["–" if value is None else json.dumps(value, ensure_ascii=False) for value in values])
        for key, values in comparable.differences(runs)
    ]
    if not rows:
        return '<p class="lead">Nothing: same config, device and versions.</p>'
    return _table(runs, rows, "code", "What differs between the configs")


def _table(runs: dict[str, Run], rows: list[tuple[str, list[str]]], kind: str, label: str) -> str:
    head = "".join(
        f'<th scope="col"><span class="named c{n}">{escape(name)}</span></th>'
        for n, name in enumerate(runs)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(title)}</th>'
        + "".join(f"<td>{escape(str(text))}</td>" for text in texts)
        + "</tr>"
        for title, texts in rows
    )
    return (
        f'<div class="scroll card" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="runs {kind}"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


# ------------------------------------------------------------------------------------------ samples
def _samples(runs: dict[str, Run], thumbnails: Thumbnails) -> str:
    """For each prompt the base's image, from the first run, and the newest image of every run."""
    sets = {name: run.samples[-1] for name, run in runs.items() if run.samples}
    if not sets:
        return ""
    first = next(run.samples[0] for run in runs.values() if run.samples)
    shown = {"base": first, **sets} if first.iteration == 0 else sets
    cards = []
    for place, item in enumerate(first.items[:SHOWN]):
        prompt = str(item.get("prompt", ""))
        sides = [
            side(sample.items[place], sample, prompt, thumbnails, label)
            for label, sample in shown.items()
            # A set with fewer samples, or others in this place, has no image in this row.
            # A run that kept fewer samples has no image in the later rows.
            if place < len(sample.items) and sample.items[place].get("prompt") == item.get("prompt")
        ]
        if any(sides):
            cards.append(
                f'<article class="pair"><header><p class="prompt">{escape(prompt)}</p></header>'
                f'<div class="duo many">{"".join(sides)}</div></article>'
            )
    at = ", ".join(f"{name} at iteration {sample.iteration}" for name, sample in sets.items())
    return (
        f'<p class="lead">The same prompts and initial noise: {escape(at)}. In file order, not'
        f' picked by result.</p><div class="grid wide">{"".join(cards)}</div>'
    )
