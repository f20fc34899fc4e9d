"""What a comparison of runs says: whether they can be compared, what differs between their configs,
and their final numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Callable

from tempflow.errors import UserError, counted, shown
from tempflow.run.logs import METRICS_FILE
from tempflow.run.means import is_sure, with_error
from tempflow.run.metrics import DRIFTS
from tempflow.run.report import verdict
from tempflow.run.report.run import Run, load_run, number
from tempflow.run.report.samples import signed

MOST = 8  # runs on a page: as many as style.css and charts.js have colors, dashes and shapes
UNLIKE = ("logging.", "$")  # keys that differ between any two runs and have no effect on results


def load_runs(folders: list[Path]) -> dict[str, Run]:
    """Read runs to be compared.

    Args:
        folders: run directories.

    Returns:
        The runs by name, in the order given.

    Raises:
        UserError: for too many runs, one run twice, or runs that cannot be compared.
    """
    if len(folders) > MOST:
        raise UserError(f"{len(folders)} runs: at most {MOST} can be compared on one page")
    runs = [load_recorded(folder) for folder in folders]
    for n, run in enumerate(runs):
        if any(run.folder.samefile(other.folder) for other in runs[:n]):
            raise UserError(f"{run.folder} is named twice")
    names = _names(runs)
    _check_prompts(dict(zip(names, runs)))
    return dict(zip(names, runs))


def load_recorded(folder: Path) -> Run:
    """Read a run directory. UserError where it has no rows of metrics."""
    run = load_run(folder)
    if not run.rows:
        raise UserError(f"{folder}: no rows in {METRICS_FILE}; is it a run directory?")
    return run


def _names(runs: list[Run]) -> list[str]:
    """A name for each run: its folder's, preceded by as many parent folders as tell all apart."""
    parts = [run.folder.resolve().parts for run in runs]
    depth, names = 1, [run.name for run in runs]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(part[-depth:]) for part in parts]
    return names


def _check_prompts(runs: dict[str, Run]) -> None:
    """UserError where two runs were evaluated on different prompts. Their mean rewards would differ
    even for the same model."""
    (first, one), *others = runs.items()
    for name, run in others:
        mine, theirs = _evaluated(one), _evaluated(run)
        if mine is not None and theirs is not None and mine != theirs:
            raise UserError(
                f"{first} was evaluated on {counted(mine, 'prompt')} and {name} on {theirs}: their"
                " rewards cannot be compared (eval.prompts, data.heldout)"
            )
        # The kept samples show prompts too: equal counts of other prompts are found by them.
        texts = [_prompts(run) for run in (one, run)]
        for n, (a, b) in enumerate(zip(*texts), 1):
            if a != b:
                raise UserError(
                    f"{first} and {name} were evaluated on different prompts: number {n} is"
                    f" {shown(a)} and {shown(b)} (data.heldout)"
                )


def _evaluated(run: Run) -> int | None:
    """Number of images of an evaluation, scored or failed; None where no row has counts."""
    for row in run.rows:
        if number(row.get("eval/scored")) is not None:
            return int(row["eval/scored"] + (number(row.get("eval/failed")) or 0))
    return None


def _prompts(run: Run) -> list[str]:
    return [str(item.get("prompt")) for item in run.samples[0].items] if run.samples else []


def same_rewards(runs: dict[str, Run]) -> bool:
    """Whether the runs have the same rewards with the same weights and options."""
    return len({str(run.config.get("rewards")) for run in runs.values()}) == 1


def differences(runs: dict[str, Run]) -> list[tuple[str, list]]:
    """(key, value in each run) of the keys that differ between configs, devices and versions; the
    value is None where a run lacks the key."""
    settings = [_settings(run) for run in runs.values()]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = [(key, [one.get(key) for one in settings]) for key in keys]
    return [(key, values) for key, values in rows if any(v != values[0] for v in values[1:])]


def _settings(run: Run) -> dict:
    from tempflow.run.report.page import flatten

    config = {key: value for key, value in flatten(run.config) if not key.startswith(UNLIKE)}
    summary = run.summary or {}
    rest = {"device": summary.get("device"), "processes": summary.get("world_size")}
    versions = {f"version of {key}": v for key, v in (summary.get("versions") or {}).items()}
    return config | {key: value for key, value in (rest | versions).items() if value is not None}


def headline(runs: dict[str, Run]) -> str:
    """One sentence on the final held-out rewards, without a period. It claims no more than their
    standard errors allow."""
    ends = [(name, *_final(run)) for name, run in runs.items()]
    known = [(name, reward, error) for name, reward, error in ends if reward is not None]
    if len(known) < 2:
        return f"{len(runs)} runs; fewer than two have a held-out reward"
    if not same_rewards(runs):
        return f"{len(runs)} runs with different rewards: compare each reward alone, not the totals"
    known.sort(key=lambda entry: -entry[1])
    (best, high, error), (second, next_to, other) = known[:2]
    said = f"{best} ends with {with_error(high, error)}, {second} with {with_error(next_to, other)}"
    if error is None or other is None:
        return f"{said}; their errors are not known"
    # The errors of two runs are taken as independent. They share prompts and noise, so this may
    # overlook a small difference, but does not invent one.
    sure = is_sure(high - next_to, math.hypot(error, other))
    return f"{said}: {'more' if sure else 'no difference'} beyond two standard errors"


def _final(run: Run) -> tuple[float | None, float | None]:
    """(held-out reward of the newest trained model, its standard error)."""
    return verdict.rewards(run)[1], number(verdict.evaluated(run).get("eval/reward/stderr"))


def numbers(runs: dict[str, Run]) -> list[tuple[str, list[str]]]:
    """(title, text for each run) of the final numbers; rows that no run has are left out."""
    found: list[tuple[str, Callable[[Run], str | None]]] = [
        ("Base reward", lambda run: _text(verdict.rewards(run)[0], "{:.3f}")),
        ("Final reward", lambda run: _with_error(*_final(run))),
        ("Gain", _gain),
        ("Held-out images scored", lambda run: _last(run, "eval/scored", "{:,.0f}")),
        *((metric.title, _drift(metric)) for metric in DRIFTS),
        ("KL to the reference", lambda run: _last(run, "kl", "{:.3g}")),
        ("Iterations", lambda run: _text(run.iterations, "{:,.0f}")),
        ("Minutes of training", lambda run: _text(verdict.minutes(run), "{:.1f}")),
        ("Seconds per iteration", _pace),
        ("Rewarded images", lambda run: _text(verdict.images(run), "{:,.0f}")),
        ("Transformer forwards", lambda run: _text(run.forwards[-1] or None, "{:,.0f}")),
        ("Device", lambda run: (run.summary or {}).get("device")),
    ]
    rows = [(title, [of(run) for run in runs.values()]) for title, of in found]
    return [(title, [text or "–" for text in texts]) for title, texts in rows if any(texts)]


def _text(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _with_error(value: float | None, stderr: float | None) -> str | None:
    return None if value is None else with_error(value, stderr)


def _gain(run: Run) -> str | None:
    change, stderr = verdict.gain(run)
    if change is None:
        return None
    return signed(change) + ("" if stderr is None else f" ± {stderr:.3f}")


def _last(run: Run, key: str, form: str) -> str | None:
    return _text(next((v for v in reversed(run.column(key)) if v is not None), None), form)


def _drift(metric) -> Callable[[Run], str | None]:
    def text(run: Run) -> str | None:
        value = number(verdict.evaluated(run).get(metric.key))
        # The base has no drift from itself; a number there would read as a result.
        if value is None or verdict.evaluated(run)["iteration"] == 0:
            return None
        return f"{value:{metric.form}}" + (", past its limit" if metric.beyond(value) else "")

    return text


def _pace(run: Run) -> str | None:
    seconds = sorted(value for value in run.column("time/total") if value is not None)
    # The median: the first iteration compiles and warms up caches.
    return _text(seconds[len(seconds) // 2] if seconds else None, "{:.2f} (median)")
