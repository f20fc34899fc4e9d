"""Assembles report.html from a run directory: verdict, numbers, images, charts, config.

Sections without content are left out, so that the page of a run that has just begun, or has no
held-out prompts, has no empty charts. Everything from the run is escaped: prompts may hold markup.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import cache
from html import escape
from pathlib import Path
from string import Template

from tempflow.run.logs import write_atomic
from tempflow.run.report import charts
from tempflow.run.report.components import components
from tempflow.run.report.run import Run, load_run
from tempflow.run.report.samples import samples_html
from tempflow.run.report.thumbnails import Thumbnails
from tempflow.run.report.verdict import facts, remarks, status, tiles, verdict

HERE = Path(__file__).parent
# Of docs/glossary.md, those that the charts and their help texts use: the page may be sent to
# somebody who has only this file.
WORDS = (
    ("advantage", "how much better an image is than the others of its group"),
    ("base", "the model before training"),
    ("branch step", "a step of the sampling at which images branch off by different noise"),
    ("child", "an image that branches off at one step and is then sampled without more noise"),
    ("forward", "one evaluation of the transformer for one image"),
    ("group", "the images whose rewards are compared with each other"),
    ("held-out", "of prompts that are never trained on"),
    ("iteration", "sampling and scoring a batch of images, and the updates that learn from it"),
    ("KL", "how far the trained model's steps are from the reference model's"),
    ("ratio", "probability of a step under the trained model over that when it was sampled"),
    ("rollout", "sampling the images of an iteration"),
    ("standard error", "how far a mean may be off by chance; the bars of the charts"),
    ("watched", "a reward that is measured and not trained on"),
)


def write_report(run_dir) -> Path:
    """Write run_dir/report.html from what the run directory holds so far, and return its path.

    The file is complete at any moment, loads nothing from elsewhere, and stays below 15 MB. An
    unfinished run, missing metrics, no evaluation and no images are all fine.

    Raises:
        UserError: for a missing run directory.
    """
    run = load_run(run_dir)
    return write_atomic(run.folder / "report.html", render(run))


def render(run: Run) -> str:
    """The page as text."""
    figures = Figures()
    reward = figures.html(charts.reward_chart(run), wide=True)
    drift = _drift(run, figures)
    # In the order of a reader's questions: images, what training did, what it cost, settings.
    body = [
        samples_html(run, Thumbnails()),
        _optimization(run, figures),
        _exploration(run, figures),
        _guards(run, figures),
        _cost(run, figures),
        _others(run, figures),
        _components(run),
        _configuration(run),
        _about(run),
        _words(),
    ]
    return fill(
        title=f"{run.name}: TempFlow-GRPO run",
        kicker=f"TempFlow-GRPO run <strong>{escape(run.name)}</strong> {status(run)}",
        heading=verdict(run),
        top=_remarks(run) + facts(run) + tiles(run),
        switch=axis_switch([run]),
        body=[(f"<section>{reward}</section>" if reward else "") + drift, *body],
        data={"frames": charts.frames(run), "charts": figures.drawn},
        source="the run directory's config.json, metrics.jsonl and samples",
    )


def fill(
    *,
    title: str,
    kicker: str,
    heading: str,
    top: str,
    switch: str,
    body: list[str],
    data: dict,
    source: str,
    head: str = "",
) -> str:
    """Fill in the template of a page with the report's style and script.

    Args:
        title: text of the browser's tab.
        kicker: HTML above the heading.
        heading: text.
        top: HTML below the heading.
        switch: HTML of the choice of x axis.
        body: HTML of the sections; empty ones are left out.
        data: frames and charts, for charts.js.
        source: text on what the page was written from.
        head: more HTML for the head.
    """
    return Template(_part("template.html")).substitute(
        title=escape(title),
        kicker=kicker,
        heading=escape(heading),
        top=top,
        switch=switch,
        body="\n".join(filter(None, body)),
        data=_json(data),  # not escaped as HTML is: a script element's text is read as it stands
        head=head,
        source=source,
        style=_part("style.css"),
        script=_part("charts.js"),
        generated=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


class Figures:
    """Collects the charts of a page. Each becomes an empty figure with its number, which charts.js
    fills from the page's data."""

    def __init__(self):
        self.drawn: list[dict] = []

    def html(self, chart: dict | None, wide: bool = False) -> str:
        if chart is None:
            return ""
        self.drawn.append(chart)
        text = f'<p class="help">{escape(chart["help"])}</p>' if chart.get("help") else ""
        return (
            "<figure"
            f' class="chart{" wide" if wide else ""}"><figcaption><h3>{escape(chart["title"])}</h3>{text}</figcaption><div'
            f' class="plot" data-chart="{len(self.drawn) - 1}"></div></figure>'
        )

    def grid(self, many: list[dict]) -> str:
        return (
            f'<div class="charts">{"".join(self.html(chart) for chart in many)}</div>'
            if many
            else ""
        )


def section(anchor: str, title: str, *parts: str) -> str:
    """A section of the page, "" where all parts are empty."""
    content = "".join(parts)
    return f'<section id="{anchor}"><h2>{title}</h2>{content}</section>' if content else ""


def _remarks(run: Run) -> str:
    text = remarks(run)
    return f'<p class="remarks">{escape(text)}</p>' if text else ""


def _drift(run: Run, figures: Figures) -> str:
    text = (
        f"How far the {run.things} are from those that the base makes from the same prompts and"
        " noise. Without drift the color shift is 0 and the others are 1. A reward can rise because"
        " of changes that it does not see, so look at these charts beside the gain."
    )
    drawn = figures.grid(charts.drift_charts(run))
    return section(
        "drift", "Drift from the base", f'<p class="lead">{text}</p>{drawn}' if drawn else ""
    )


def _optimization(run: Run, figures: Figures) -> str:
    return section(
        "optimization",
        "Optimization",
        figures.grid(charts.breakdown_charts(run)),
        figures.grid(charts.training_charts(run)),
    )


def _exploration(run: Run, figures: Figures) -> str:
    heat = figures.html(charts.spread_chart(run))
    means = [(f"step {step}", charts.mean(values)) for step, values in charts.spread_columns(run)]
    bars = _bars(
        "Mean spread",
        "Over all iterations; step 0 is the one nearest to pure noise.",
        means,
        "{:.3f}",
    )
    pair = f'<div class="charts{" uneven" if heat else ""}">{heat}{bars}</div>' if bars else ""
    return section("exploration", "Exploration", pair, figures.grid(charts.signal_charts(run)))


def _guards(run: Run, figures: Figures) -> str:
    return section("guards", "Guards", figures.grid(charts.guard_charts(run)))


def _cost(run: Run, figures: Figures) -> str:
    totals = [
        (name, sum(value or 0 for value in values)) for name, values in charts.phase_columns(run)
    ]
    whole = sum(value for _, value in totals) or 1  # not the clock: phases may overlap
    bars = _bars(
        "Time by phase",
        "Seconds of the whole run.",
        totals,
        "{:,.1f}",
        [value / whole for _, value in totals],
    )
    drawn = [figures.html(chart) for chart in charts.cost_charts(run)]
    parts = drawn[:1] + [bars] + drawn[1:] if totals else drawn
    return section(
        "cost", "Cost", f'<div class="charts">{"".join(parts)}</div>' if any(parts) else ""
    )


def _others(run: Run, figures: Figures) -> str:
    # Behind a fold: a metric that no section knows is still on the page.
    many = charts.other_charts(run)
    return (
        f'<details class="block"><summary>{len(many)} more'
        f" metrics</summary>{figures.grid(many)}</details>"
        if many
        else ""
    )


def _bars(
    title: str,
    text: str,
    rows: list[tuple[str, float | None]],
    form: str,
    shares: list[float] | None = None,
) -> str:
    known = [(name, value) for name, value in rows if value is not None]
    if not known:
        return ""
    top = max(value for _, value in known) or 1  # all zero: no division by it
    lines = []
    for n, (name, value) in enumerate(known):
        colour, share = (
            (f"c{n % 8}", f'<td class="num">{shares[n]:.0%}</td>') if shares else ("main", "")
        )
        lines.append(
            f'<tr><th scope="row">{escape(name)}</th><td class="track">'
            f'<span class="{colour}" style="width:{max(0, value / top):.1%}"></span></td>'
            f'<td class="num">{form.format(value)}</td>{share}</tr>'
        )
    return (
        f'<figure class="chart"><figcaption><h3>{title}</h3><p class="help">{text}</p></figcaption>'
        f'<table class="bars"><tbody>{"".join(lines)}</tbody></table></figure>'
    )


def axis_switch(runs: list[Run]) -> str:
    """The choice of x axis, "" where no run has two rows."""
    if all(len(run.rows) < 2 for run in runs):
        return ""
    axes = [("iteration", "iterations")] + [
        (key, text)
        for key, text in (
            ("minutes", "minutes"),
            ("images", f"rewarded {runs[0].things}"),
            ("forwards", "transformer forwards"),
        )
        # An axis that is 0 everywhere, as forwards in old runs, would put all points in one place.
        if all(getattr(run, key)[-1] for run in runs)
    ]
    options = "".join(
        '<label><input type="radio" name="axis"'
        f' value="{key}"{" checked" if key == "iteration" else ""}><span>{text}</span></label>'
        for key, text in axes
    )
    return (
        f'<fieldset class="switch" id="axis"><legend>Horizontal axis</legend>{options}</fieldset>'
    )


def _components(run: Run) -> str:
    """What ran, on what, and how far each part is verified."""
    lines = "".join(
        f'<tr><th scope="row">{escape(part)}</th><td>{escape(chosen)}</td><td>{escape(level)}</td></tr>'
        for part, chosen, level in components(run)
    )
    if not lines:
        return ""
    device = (run.summary or {}).get("device")
    text = (
        f"The parts of this run{f', which ran on {device}' if device else ''}, and the strongest check"
        " of each that the project has on record. A simulated GPU counts memory and transfers, but"
        " computes no numbers of a real GPU and measures no time."
    )
    return (
        f'<details class="block" id="parts"><summary>What ran</summary><p class="lead">{escape(text)}</p>'
        '<div class="scroll"><table class="pairs three"><thead><tr><th scope="col">part</th><th scope="col">this run'
        f'</th><th scope="col">verified</th></tr></thead><tbody>{lines}</tbody></table></div></details>'
    )


def _configuration(run: Run) -> str:
    if not run.config:
        return ""
    rows = "".join(
        "<tr><th"
        f' scope="row">{escape(key)}</th><td>{escape(json.dumps(value, ensure_ascii=False))}</td></tr>'
        for key, value in flatten(run.config)
    )
    return (
        '<details class="block" id="config"><summary>Configuration</summary><input type="search"'
        ' id="config-search" placeholder="Search keys and values" aria-label="Search the'
        f' configuration"><table class="pairs"><tbody>{rows}</tbody></table><p class="note"'
        ' id="config-none" hidden>Nothing found.</p></details>'
    )


def flatten(value, prefix: str = "") -> list[tuple[str, object]]:
    """(dotted key, value) pairs of nested sections; lists and empty sections are values."""
    if not isinstance(value, dict) or not value:
        return [(prefix, value)]
    return [
        leaf
        for key, inner in value.items()
        for leaf in flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    ]


def _about(run: Run) -> str:
    summary = run.summary or {}
    rows = [(key, summary.get(key)) for key in ("model", "device")] + list(
        (summary.get("versions") or {}).items()
    )
    rows = [(key, value) for key, value in rows if value not in (None, "")]
    lines = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(str(value))}</td></tr>'
        for key, value in rows
    )
    table = f'<table class="pairs"><tbody>{lines}</tbody></table>' if lines else ""
    return (
        f'<details class="block" id="versions"><summary>Versions</summary>{table}</details>'
        if table
        else ""
    )


def _words() -> str:
    lines = "".join(
        f'<tr><th scope="row">{word}</th><td>{meaning}</td></tr>' for word, meaning in WORDS
    )
    return (
        '<details class="block" id="words"><summary>Words of this page</summary>'
        f'<table class="pairs words"><tbody>{lines}</tbody></table></details>'
    )


def _json(value) -> str:
    """JSON for a script element. A "</script>" in a prompt would end the element early, so all
    characters of markup are escaped, which JSON allows in strings."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache  # a run writes its report many times
def _part(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
