"""What the run achieved: one sentence, remarks, the headline numbers and a line of facts.

summary.json is preferred where it exists; an unfinished run is judged by its newest evaluation. A
change within two standard errors is never called a gain or a loss.
"""

from __future__ import annotations

import math
from html import escape

from tempflow.errors import counted
from tempflow.run.means import is_sure, unpaired_gain
from tempflow.run.metrics import changes, drifts
from tempflow.run.report.charts import mean
from tempflow.run.report.run import Run, number
from tempflow.run.report.samples import signed

PAST = "past its limit"
TRIFLE = 0.005  # a smaller change of the mean reward counts as none


def rewards(run: Run) -> tuple[float | None, float | None]:
    """Held-out reward of the base and of the newest evaluated model, None where not known."""
    summary = run.summary or {}
    base, tuned = number(summary.get("base_reward")), number(summary.get("tuned_reward"))
    if base is None and run.heldout and run.heldout[0][0] == 0:
        base = run.heldout[0][1]
    if tuned is None and run.heldout and run.heldout[-1][0] > 0:
        tuned = run.heldout[-1][1]
    return base, tuned


def gain(run: Run) -> tuple[float | None, float | None]:
    """The change of the held-out reward from the base to the newest evaluated model, and its
    standard error; None where not known. It is the mean of the paired differences if the run
    recorded it."""
    base, tuned = rewards(run)
    if base is None or tuned is None:
        return None, None
    found = evaluated(run)
    # The difference of the two means is the last resort: it has no standard error.
    change = number(found.get("eval/gain"))
    if change is None:
        return unpaired_gain(base, tuned, found.get("eval/failed")), None
    return change, number(found.get("eval/gain/stderr"))


def evaluated(run: Run) -> dict:
    """The row of the newest evaluation, {} without one."""
    return next(
        (row for row in reversed(run.rows) if number(row.get("eval/reward")) is not None), {}
    )


def verdict(run: Run) -> str:
    """One sentence on what training changed. It claims no more than the run shows."""
    base, tuned = rewards(run)
    change, stderr = gain(run)
    if base is not None and tuned is not None:
        if change is None:
            return (
                f"No held-out prompt was scored both before training ({base:.3f}) and after"
                f" ({tuned:.3f}): the gain is unknown."
            )
        how, doubt = _direction(change, stderr)
        so_far = "Held-out" if run.summary else "So far, held-out"
        error = "" if stderr is None else f" ({signed(change)} ± {stderr:.3f} standard error)"
        return f"{so_far} reward {how} from {base:.3f} to {tuned:.3f}{error}{_spent(run)}{doubt}."
    training = [value for value in run.column("reward/mean") if value is not None]
    if len(training) > 1:
        # Tenths, not single iterations: the reward of one iteration depends on its few prompts.
        tenth = max(1, len(training) // 10)
        first, last = mean(training[:tenth]), mean(training[-tenth:])
        return (
            f"Training reward went from {first:.3f} to {last:.3f}{_spent(run)}; no trained model"
            " has been evaluated."
        )
    return (
        f"Too early to tell: {len(run.rows)} iteration{'' if len(run.rows) == 1 else 's'} recorded."
    )


def remarks(run: Run) -> str:
    """What a reader has to know beside the verdict: drift past the limits, failed images, a better
    evaluation earlier, an early stop. "" where there is nothing."""
    change, _ = gain(run)
    drifted = _drifted(run) if change is not None else ""
    peak = _peak(run) if change is not None else ""
    return " ".join(filter(None, [drifted, _lost(run), peak, _stopped(run)]))


def _direction(change: float, stderr: float | None) -> tuple[str, str]:
    """What the held-out reward did, and the doubt to add at the sentence's end."""
    if stderr is not None and not is_sure(change, stderr):
        return "went", "; chance alone can explain a difference within two standard errors"
    # A change can be beyond its error and still be too small to matter.
    return ("rose" if change > TRIFLE else "fell" if change < -TRIFLE else "hardly changed:"), ""


def status(run: Run) -> str:
    """A badge: finished, or how far the run got."""
    total = run.setting("training", "iterations")
    if run.summary is None:
        of = f" of {total}" if isinstance(total, int) else ""
        return f'<span class="badge open">unfinished: iteration {run.iterations}{of}</span>'
    if not isinstance(total, int) or run.iterations >= total:
        return '<span class="badge done">finished</span>'
    limit = number(run.setting("training", "minutes"))
    if limit is not None and (minutes(run) or 0.0) >= limit and not run.summary.get("stopped"):
        # The time limit is the planned end of such a run, although its config names more iterations.
        return f'<span class="badge done">finished: {counted(limit, "minute")} of training</span>'
    return f'<span class="badge">stopped at {run.iterations} of {total}</span>'


def tiles(run: Run) -> str:
    """The headline numbers as a description list."""
    base, tuned = rewards(run)
    forwards = run.forwards[-1] if run.forwards else None
    found = [
        ("Base reward", _measured(base, _base_stderr(run))),
        ("Tuned reward", _measured(tuned, number(evaluated(run).get("eval/reward/stderr")))),
        ("Gain", _measured(*gain(run), form=signed)),
        *_limited(run),
        (f"Held-out {run.things} scored", _scored_of(run)),
        ("Minutes of training", _text(minutes(run), "{:.1f}")),
        ("Iterations", _text(run.iterations or None, "{:,.0f}")),
        (f"Rewarded {run.things}", _text(images(run), "{:,.0f}")),
        ("Transformer forwards", _text(forwards or None, "{:,.0f}")),
    ]
    cells = [(name, text) for name, text in found if text is not None]
    inner = "".join(
        f"<div{_mark(name, text)}><dt>{name}</dt><dd>{text}</dd></div>" for name, text in cells
    )
    return f'<dl class="tiles">{inner}</dl>' if cells else ""


def _limited(run: Run) -> list[tuple[str, str]]:
    """(title, HTML) of the drift metrics with a limit, once a trained model was evaluated."""
    # The base's own evaluation has a color shift of 0, which is no result.
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
    """Model, method, rewards and device as a description list, as far as they are known."""
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
    """Minutes of training, None where not known."""
    found = number((run.summary or {}).get("minutes"))
    return found if found is not None else run.minutes[-1] if run.minutes else None


def images(run: Run) -> float | None:
    """Number of rewarded images, None where not known."""
    found = number((run.summary or {}).get("images"))
    return found if found is not None else run.images[-1] if run.images and run.images[-1] else None


def _scored(run: Run) -> float | None:
    return number(evaluated(run).get("eval/scored"))


def _scored_of(run: Run) -> str | None:
    scored, failed = _scored(run), number(evaluated(run).get("eval/failed"))
    if scored is None:
        return None
    return f"{scored:,.0f}" + (f" <small>of {scored + failed:,.0f}</small>" if failed else "")


def _lost(run: Run) -> str:
    """How many images of the newest evaluation have no reward."""
    failed, scored = number(evaluated(run).get("eval/failed")), _scored(run)
    if not failed:
        return ""
    # Rows of earlier versions hold no eval/scored.
    total = "" if scored is None else f" of the {failed + scored:.0f}"
    return f"In the newest evaluation {failed:.0f}{total} {run.things} could not be scored."


def _spent(run: Run) -> str:
    """Training time and images up to the newest evaluation, or without evaluations up to now."""
    spent, seen = minutes(run), images(run)
    # In an unfinished run, training after the newest evaluation did not lead to its reward.
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
        # Evaluations and checkpoints are not in it; wall clock time is longer.
        parts[0] += " of training"
    if seen:
        parts.append(f"{seen:,.0f} rewarded {run.things}")
    return f" in {' and '.join(parts)}" if parts else ""


def _stopped(run: Run) -> str:
    reason = (run.summary or {}).get("stopped")
    return f"Training was stopped early by {reason}." if reason else ""


def _drifted(run: Run) -> str:
    """In which ways the images have changed beyond the limits."""
    changed = changes(evaluated(run))
    if not changed:
        return ""
    # "Also": whether the reward rose because of the drift, no number here can tell.
    return f"The {run.things} also drifted from the base's: {_listed(changed)}."


def _listed(clauses: list[str]) -> str:
    return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"


def _peak(run: Run) -> str:
    """The highest evaluation, where it is higher than the newest by more than the errors of both
    explain."""
    tuned = rewards(run)[1]
    if tuned is None or not run.heldout:
        return ""
    best, at = max((reward, iteration) for iteration, reward in run.heldout)
    errors = [run.stderr(iteration) for iteration in (at, run.heldout[-1][0])]
    # Without errors on record, a higher value is told of: leaving it out would hide a decline.
    known = [error for error in errors if error is not None]
    sure = len(known) < len(errors) or is_sure(best - tuned, math.hypot(*known))
    if best > tuned + TRIFLE and sure and at:
        return f"The highest evaluation was {best:.3f}, at iteration {at}."
    return ""
