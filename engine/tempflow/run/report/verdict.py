"""What the run achieved, in one sentence, a few numbers and a line of facts."""

from __future__ import annotations

import math
from html import escape

from tempflow.run.means import is_sure, unpaired_gain
from tempflow.run.metrics import changes, drifts
from tempflow.run.report.charts import mean
from tempflow.run.report.run import Run, number
from tempflow.run.report.samples import signed

PAST = "past its limit"
TRIFLE = 0.005  # a smaller change of the mean reward is called none


def rewards(run: Run) -> tuple[float | None, float | None]:
    """Held-out reward of the base and of the newest evaluated model."""
    summary = run.summary or {}
    base, tuned = number(summary.get("base_reward")), number(summary.get("tuned_reward"))
    if base is None and run.heldout and run.heldout[0][0] == 0:
        base = run.heldout[0][1]
    if tuned is None and run.heldout and run.heldout[-1][0] > 0:
        tuned = run.heldout[-1][1]
    return base, tuned


def gain(run: Run) -> tuple[float | None, float | None]:
    """How far the newest evaluated model is from the base, prompt by prompt where that was
    measured, and its standard error."""
    base, tuned = rewards(run)
    if base is None or tuned is None:
        return None, None
    found = evaluated(run)
    change = number(found.get("eval/gain"))
    if change is None:
        return unpaired_gain(base, tuned, found.get("eval/failed")), None
    return change, number(found.get("eval/gain/stderr"))


def evaluated(run: Run) -> dict:
    """The row of the newest evaluation."""
    return next(
        (row for row in reversed(run.rows) if number(row.get("eval/reward")) is not None), {}
    )


def verdict(run: Run) -> str:
    """One sentence that claims no more than the run shows."""
    base, tuned = rewards(run)
    change, stderr = gain(run)
    if change is None and None not in (base, tuned):
        return (
            f"No held-out prompt was scored both before training ({base:.3f}) and after"
            f" ({tuned:.3f}): the gain is unknown.{_lost(run)}"
        )
    if change is not None:
        how = "rose" if change > TRIFLE else "fell" if change < -TRIFLE else "hardly moved,"
        sure = ""
        if stderr is not None:
            how = (
                how
                if is_sure(change, stderr)
                else "shows no difference beyond two standard errors,"
            )
            sure = f" ({signed(change)} ± {stderr:.3f} prompt by prompt)"
        so_far = "Held-out" if run.summary else "So far, held-out"
        said = f"{so_far} reward {how} from {base:.3f} to {tuned:.3f}{sure}{_spent(run)}."
        return f"{said}{_drifted(run, how == 'rose')}{_lost(run)}{_peak(run, tuned)}{_stopped(run)}"  # type: ignore[arg-type]  # known where a change is
    training = [value for value in run.column("reward/mean") if value is not None]
    if len(training) > 1:
        tenth = max(1, len(training) // 10)
        first, last = mean(training[:tenth]), mean(training[-tenth:])
        return (
            f"Training reward went from {first:.3f} to {last:.3f}{_spent(run)}; no trained model"
            " has been evaluated."
        )
    return (
        f"Too early to tell: {len(run.rows)} iteration{'' if len(run.rows) == 1 else 's'} recorded."
    )


def status(run: Run) -> str:
    """A badge: finished, or how far the run got."""
    total = run.setting("training", "iterations")
    if run.summary is not None:
        early = isinstance(total, int) and run.iterations < total
        return (
            f'<span class="badge">stopped at {run.iterations} of {total}</span>'
            if early
            else '<span class="badge done">finished</span>'
        )
    of = f" of {total}" if isinstance(total, int) else ""
    return f'<span class="badge open">unfinished: iteration {run.iterations}{of}</span>'


def tiles(run: Run) -> str:
    """The headline numbers as a description list."""
    base, tuned = rewards(run)
    forwards = run.forwards[-1] if run.forwards else None
    found = [
        ("Base reward", _measured(base, _base_stderr(run))),
        ("Tuned reward", _measured(tuned, number(evaluated(run).get("eval/reward/stderr")))),
        ("Gain", _measured(*gain(run), form=signed)),
        *_limited(run),
        (f"Held-out {run.things} scored", _text(_scored(run), "{:,.0f}")),
        ("Minutes", _text(minutes(run), "{:.1f}")),
        ("Iterations", _text(run.iterations or None, "{:,.0f}")),
        (f"Rewarded {run.things}", _text(images(run), "{:,.0f}")),
        ("Forwards", _text(forwards or None, "{:,.0f}")),
    ]
    cells = [(name, text) for name, text in found if text is not None]
    inner = "".join(
        f"<div{_mark(name, text)}><dt>{name}</dt><dd>{text}</dd></div>" for name, text in cells
    )
    return f'<dl class="tiles">{inner}</dl>' if cells else ""


def _limited(run: Run) -> list[tuple[str, str]]:
    """The monitors of drift that have a limit, once a trained model was evaluated."""
    if gain(run)[0] is None:
        return []
    return [
        (
            metric.title,
            f"{value:{metric.form}}"
            + (f" <small>{PAST} {metric.limit:g}</small>" if metric.beyond(value) else ""),
        )
        for metric, value in drifts(evaluated(run))
        if metric.limit is not None
    ]


def _mark(name: str, text: str) -> str:
    return " class=gain" if name == "Gain" else " class=lost" if PAST in text else ""


def _text(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _measured(value: float | None, stderr: float | None, form="{:.3f}".format) -> str | None:
    """A mean with its standard error."""
    if value is None:
        return None
    return form(value) + ("" if stderr is None else f" <small>± {stderr:.3f}</small>")


def _base_stderr(run: Run) -> float | None:
    found = number((run.summary or {}).get("base_stderr"))
    return run.stderr(0) if found is None else found


def facts(run: Run) -> str:
    """Model, method, rewards and device, as far as they are known."""
    summary, rollout = run.summary or {}, run.config.get("rollout") or {}
    size = (
        f"{rollout['width']} × {rollout['height']} px"
        if {"width", "height"} <= set(rollout)
        else None
    )
    size = f"{size}, {rollout['frames']} frames" if size and run.things == "videos" else size
    lora = run.setting("model", "lora")
    tuned = (
        f"LoRA rank {lora.get('rank', '?')}"
        if isinstance(lora, dict)
        else "full weights"
        if run.config
        else None
    )
    plan = rollout.get("plan")
    plan = plan.get("type") if isinstance(plan, dict) else plan
    values = [
        ("Model", run.setting("model", "path") or summary.get("model")),
        ("Tuned", tuned),
        ("Plan", plan),
        ("Reward", ", ".join(run.config.get("rewards") or {}) or None),
        (run.things.title(), size),
        ("Device", summary.get("device")),
    ]
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in values
        if value
    )
    return f'<dl class="facts">{shown}</dl>' if shown else ""


def minutes(run: Run) -> float | None:
    found = number((run.summary or {}).get("minutes"))
    return found if found is not None else run.minutes[-1] if run.minutes else None


def images(run: Run) -> float | None:
    found = number((run.summary or {}).get("images"))
    return found if found is not None else run.images[-1] if run.images and run.images[-1] else None


def _scored(run: Run) -> float | None:
    return number(evaluated(run).get("eval/scored"))


def _lost(run: Run) -> str:
    """What of the newest evaluation has no reward."""
    failed, scored = number(evaluated(run).get("eval/failed")), _scored(run)
    if not failed:
        return ""
    total = "" if scored is None else f" of its {failed + scored:.0f}"
    return f" {failed:.0f}{total} {run.things} could not be scored."


def _spent(run: Run) -> str:
    """What the newest evaluated model had cost, or in a run without evaluations the newest one."""
    spent, seen = minutes(run), images(run)
    if run.summary is None and run.heldout:
        total = run.at(run.heldout[-1][0])
        spent, seen = total["minutes"], total["images"]
    parts = []
    if spent:
        parts.append(
            f"{spent * 60:.0f} seconds"
            if spent < 1
            else f"{spent:.1f} minutes"
            if spent < 600
            else f"{spent / 60:.1f} hours"
        )
        parts[0] += " of training"
    if seen:
        parts.append(f"{seen:,.0f} rewarded {run.things}")
    return f" in {' and '.join(parts)}" if parts else ""


def _stopped(run: Run) -> str:
    reason = (run.summary or {}).get("stopped")
    return f" Stopped early by {reason}." if reason else ""


def _drifted(run: Run, rose: bool) -> str:
    """What of the images has changed beyond the limits."""
    changed = changes(evaluated(run))
    if not changed:
        return ""
    how = (
        "The reward was bought with drift from the base"
        if rose
        else f"The {run.things} drifted from the base"
    )
    return f" {how}: {_listed(changed)}."


def _listed(clauses: list[str]) -> str:
    return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"


def _peak(run: Run, tuned: float) -> str:
    """The highest evaluation, where it is higher than the newest by more than the errors of both
    explain."""
    best, at = max(((reward, iteration) for iteration, reward in run.heldout), default=(tuned, 0))
    errors = (
        [run.stderr(iteration) for iteration in (at, run.heldout[-1][0])] if run.heldout else [None]
    )
    sure = None in errors or is_sure(best - tuned, math.hypot(*errors))
    return (
        f" Its highest was {best:.3f}, at iteration {at}."
        if best > tuned + TRIFLE and sure and at
        else ""
    )
