"""The report of gpu.py: a JSON file that grows step by step, and a Markdown page."""

from __future__ import annotations

import json
from pathlib import Path

from gpu_steps import BY_NAME
from tempflow.run.logs import write_atomic

SHOWN = 160  # characters of a reason on the page


class Report:
    """The report of one call of gpu.py, whose file is written after every step.

    Args:
        head: card, date, versions and options, on which all results depend.
    """

    def __init__(self, **head):
        self.head, self.steps, self.file = head, [], None

    def add(self, step: dict) -> None:
        self.steps.append(step)
        if self.file:
            self.write()

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.file, json.dumps(self.head | {"steps": self.steps}, indent=1))

    @property
    def proved(self) -> dict[str, str]:
        """By path, the first step that showed it."""
        found: dict[str, str] = {}
        for step in self.steps:
            for path in step["proved"]:
                found.setdefault(path, step["name"])
        return found

    def write_page(self) -> Path:
        page = self.file.with_suffix(".md")
        write_atomic(page, summary(self.head, self.steps))
        return page


def summary(head: dict, steps: list[dict]) -> str:
    """The Markdown page: a line for each step, then the tables of the steps."""
    title = (
        "# Rehearsal on a CPU: no number below says anything about a GPU"
        if head["rehearsed"]
        else f"# {head['card']}, {head['date']}"
    )
    versions = ", ".join(
        f"{name} {version}" for name, version in head.get("versions", {}).items() if version
    )
    lines = [
        title,
        "",
        f"`python benchmarks/gpu.py`; {versions}.",
        "",
        "| step | status | s | |",
        "|---|---|---|---|",
    ]
    for step in steps:
        said = step["result"].get("headline") or BY_NAME[step["name"]].about
        reason = f"; {step['reason'][:SHOWN]}" if step["reason"] else ""
        lines.append(
            f"| {step['name']} | {step['status']} | {step['seconds']:.0f} |"
            f" {_cell(said + reason)} |"
        )
    for step in steps:
        if step["result"].get("table"):
            lines += [
                "",
                f"**{step['name']}**: {BY_NAME[step['name']].about}.",
                "",
                *table(step["result"]["table"]),
            ]
    return "\n".join(lines) + "\n"


def table(rows: list[dict]) -> list[str]:
    """A Markdown table of dictionaries, with a column for every key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return head + [
        f"| {' | '.join(_cell(_text(row.get(column))) for column in columns)} |" for row in rows
    ]


def _text(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
