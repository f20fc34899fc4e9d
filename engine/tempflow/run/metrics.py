"""The table of metrics in metrics.jsonl: title, meaning, and which direction is better.

The report's charts, the stopping rule, the console and docs/metrics.md read this table. A metric
that is missing here is still shown in the report, under its key. In a key, NAME stands for the name
of a reward and K for the number of a step.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A metric, or a pattern of metrics."""

    key: str
    """In metrics.jsonl; may hold NAME and K."""
    title: str
    """Of its chart."""
    help: str
    """Its meaning; starts in lower case and has no period, for tables."""
    better: Literal["higher", "lower"] | None = None
    """None where neither direction is better in itself."""
    limit: float | None = None
    """For a drift metric: the value beyond which the images count as changed; see `changes`."""
    change: str = ""
    """What is then said; {} is the value."""
    form: str = ".2f"
    """Format of the value where it is shown as text."""

    def beyond(self, value: float) -> bool:
        """Whether the value is past the limit."""
        return self.limit is not None and (
            value > self.limit if self.better == "lower" else value < self.limit
        )


# The order within a group is the order of the charts and of the rows in docs/metrics.md.
HELDOUT = (
    Metric(
        "eval/reward",
        "Held-out reward",
        "mean weighted reward of the held-out images, of the averaged weights once there is an"
        " average; judge a run by this metric",
        "higher",
    ),
    Metric("eval/reward/stderr", "Its standard error", "over prompts"),
    Metric(
        "eval/gain",
        "Held-out gain",
        "mean change of the held-out reward since the base, prompt by prompt",
        "higher",
    ),
    Metric(
        "eval/gain/stderr",
        "Its standard error",
        "of the mean of the differences; a gain within two standard errors may be chance",
    ),
    Metric("eval/scored", "Held-out images scored", "images of an evaluation that have a reward"),
    Metric(
        "eval/failed",
        "Failed held-out images",
        "images of an evaluation without a reward; they are left out of all means",
        "lower",
    ),
    Metric(
        "eval/not_finite",
        "Broken held-out images",
        "images of an evaluation that hold NaN or infinity",
        "lower",
    ),
    Metric(
        "eval/NAME",
        "Held-out NAME",
        "mean of one reward alone, over the prompts that it applies to",
        "higher",
    ),
    Metric("eval/NAME/stderr", "Its standard error", "over those prompts"),
    Metric("eval/NAME/scored", "Held-out images scored by NAME", "of those prompts"),
    Metric("eval/NAME/failed", "Held-out images failed by NAME", "of those prompts", "lower"),
)
# The limits are this project's choice, not a standard. For scale: earlier settings of the shipped
# run had a color shift of 86 levels at a reward of 0.609, today's have 6 at 0.585 (docs/log.md).
DRIFTS = (
    Metric(
        "drift/color_shift",
        "Color shift",
        "distance of the mean color from the base's, in gray levels of 0 to 255; mean color of the"
        " ink where the base's images have a plain background",
        "lower",
        15.0,
        "the mean color moved by {:.0f} of 255 gray levels",
        ".1f",
    ),
    Metric(
        "drift/color_spread",
        "Color spread",
        "how much the colors vary from prompt to prompt, relative to the base",
        "higher",
        0.9,
        "colors vary only {:.2f} times as much as the base's",
    ),
    Metric(
        "drift/diversity",
        "Diversity",
        "mean pixel distance between the images of two prompts, relative to the base",
        "higher",
    ),
    Metric(
        "eval/precision",
        "Precision",
        "share of the images that are like some of the base's (eval.precision_recall); falls with"
        " anything new, better images too",
        "higher",
    ),
    Metric(
        "eval/recall",
        "Recall",
        "share of the base's images that are like some of the current ones (eval.precision_recall);"
        " falls as images become alike",
        "higher",
        0.5,
        "only {:.0%} of the base's images are like some of the current ones",
    ),
)
TRAINING = (
    Metric(
        "kl",
        "KL to the reference",
        "how far the trained model's steps are from the reference model's, mean over the children;"
        " grows as training moves away from the base",
        "lower",
    ),
    Metric(
        "clip_fraction",
        "Clip fraction",
        "share of children whose ratio left the clip range of the objective; with dppo and hinge,"
        " share of children that have no gradient left",
    ),
    Metric(
        "ratio/max_dev",
        "Largest ratio deviation",
        "max |ratio − 1|; 0 with one update per rollout, since the same weights sampled",
    ),
    Metric("grad_norm", "Gradient norm", "before gradient clipping"),
    Metric(
        "loss",
        "Loss",
        "its level says little, because the advantages of a group have mean 0; watch for jumps",
    ),
    Metric("lr", "Learning rate", "of the last update"),
)
SIGNAL = (
    Metric(
        "reward/zero_std_groups",
        "Groups without spread",
        "share of groups whose rewards are all equal; they have no gradient",
    ),
    Metric(
        "reward/std", "Reward spread", "standard deviation over the iteration's rewarded images"
    ),
    Metric(
        "prompts/skipped",
        "Skipped prompts",
        "share of the drawn prompts that were skipped because their rewards had no spread"
        " (data.curation)",
    ),
    Metric(
        "prompts/solved",
        "Skipped prompts, solved",
        "share of all prompts that are skipped and have rewards above the average prompt's",
    ),
    Metric(
        "prompts/hopeless",
        "Skipped prompts, hopeless",
        "share of all prompts that are skipped and have rewards below the average prompt's",
    ),
    Metric(
        "reward/failed",
        "Failed rewards",
        "images whose reward could not be computed; they are left out of their group",
        "lower",
    ),
)
DIVERSITY = (
    Metric(
        "diversity/seeds",
        "Difference between seeds",
        "mean pixel distance of a prompt's images from different initial noise; falls towards 0 as"
        " the policy collapses onto one image",
        "higher",
    ),
    Metric(
        "diversity/children",
        "Difference between children",
        "mean pixel distance of the images that branch off from one state",
        "higher",
    ),
)
OTHERS = (
    Metric("reward/mean", "Training reward", "mean over the children of this iteration", "higher"),
    Metric(
        "reward/trunk",
        "Reward of the trunks",
        "mean over the samples without noise in their steps",
        "higher",
    ),
    Metric("reward/NAME", "Training NAME", "mean of one reward alone, unweighted", "higher"),
    Metric("reward/NAME/std", "Spread of NAME", "its standard deviation"),
    Metric(
        "reward_std/step_K",
        "Spread of branch step K",
        "standard deviation of the rewards within the groups of one branch step; large where the"
        " noise of the step decides about the reward",
    ),
    Metric(
        "adapt/p_step_K",
        "Chance of branch step K",
        "probability of drawing this branch step in the iteration (rollout.adapt)",
    ),
    Metric(
        "adapt/noise_K",
        "Noise of branch step K",
        "factor on the noise of this branch step in the iteration (rollout.adapt)",
    ),
    Metric("advantage/mean_abs", "Size of the advantages", "mean |advantage|"),
    Metric(
        "clip_fraction/high",
        "Clipped above",
        "share of children whose ratio is above the clip range",
    ),
    Metric(
        "clip_fraction/low",
        "Clipped below",
        "share of children whose ratio is below the clip range",
    ),
    Metric("ratio/min", "Smallest ratio", "at the last update"),
    Metric("ratio/max", "Largest ratio", "at the last update"),
    Metric(
        "mismatch/log_prob",
        "Log-probability mismatch",
        "difference between the log-probabilities of the rollout and of the training engine, with"
        " the same weights",
        "lower",
    ),
    Metric("updates/skipped", "Updates skipped", "because their gradient was not finite", "lower"),
    Metric(
        "suffix/reward_rank_correlation",
        "Suffix: rewards",
        "rank correlation between the rewards with the coarse and with the exact suffix",
        "higher",
    ),
    Metric(
        "suffix/advantage_rank_correlation",
        "Suffix: advantages",
        "rank correlation between the advantages with the coarse and with the exact suffix",
        "higher",
    ),
    Metric("images", "Images", "rewarded in the iteration"),
    Metric("images/total", "Images so far", "rewarded since the run began"),
    Metric("forwards/rollout", "Rollout forwards", "rows forwarded by the rollout, all ranks"),
    Metric("forwards/train", "Training forwards", "rows forwarded by the updates, all ranks"),
    Metric("rollout/rows_per_forward", "Rows per forward", "of the rollout, on average"),
    Metric("rollout/peak_latents", "Latents held", "largest number at a time in the rollout"),
    Metric(
        "rollout/padded_rows", "Padded rows", "rows without use that fill up a CUDA graph's batch"
    ),
    Metric("time/rollout", "Seconds: rollout", "denoising"),
    Metric("time/decode", "Seconds: decoding", "latents to images"),
    Metric("time/reward", "Seconds: reward", "waited for after the rollout"),
    Metric(
        "time/reward_busy",
        "Seconds: reward workers",
        "spent by all workers together, during the rollout",
    ),
    Metric("time/audit", "Seconds: audit", "of the coarse suffix against the exact one"),
    Metric("time/train", "Seconds: updates", "all updates of the iteration"),
    Metric("time/sync", "Seconds: weight sync", "trained weights into the rollout copy"),
    Metric("time/eval", "Seconds: evaluation", "not part of time/total"),
    Metric("time/total", "Seconds: iteration", "without evaluation and checkpoint"),
    Metric("time/elapsed", "Seconds so far", "sum of time/total"),
)
GROUPS = {
    "Held-out": HELDOUT,
    "Drift": DRIFTS,
    "Updates": TRAINING,
    "Signal": SIGNAL,
    "Diversity": DIVERSITY,
    "Others": OTHERS,
}
DRIFT = tuple(metric.key for metric in DRIFTS)


def describe(key: str) -> Metric | None:
    """The metric of a key: the one with this key, else one whose pattern matches; else None."""
    exact, patterns = _table()
    return exact.get(key) or next(
        (metric for pattern, metric in patterns if pattern.fullmatch(key)), None
    )


def changes(values: dict) -> list[str]:
    """A clause for each way in which the images have changed beyond its limit. values: a row of
    metrics or a summary."""
    return [metric.change.format(value) for metric, value in drifts(values) if metric.beyond(value)]


def drift_texts(values: dict, beyond: bool = False) -> list[str]:
    """Text on each drift metric: its value, and its limit where the value is beyond that.

    Args:
        values: a row of metrics or a summary; metrics that it lacks are left out.
        beyond: only metrics beyond their limits.
    """
    return [
        f"{metric.title.lower()} {value:{metric.form}}"
        + (f" (limit {metric.limit:g})" if metric.beyond(value) else "")
        for metric, value in drifts(values)
        if metric.beyond(value) or not beyond
    ]


def drifts(values: dict) -> list[tuple[Metric, float]]:
    """The drift metrics that a row of metrics or a summary has, with their values."""
    # summary.json may hold null, and rows of earlier versions lack some.
    known = [(metric, values.get(metric.key)) for metric in DRIFTS]
    return [
        (metric, value)
        for metric, value in known
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


@lru_cache
def _table() -> tuple[dict[str, Metric], list[tuple[re.Pattern, Metric]]]:
    every = [metric for group in GROUPS.values() for metric in group]
    patterns = [
        (re.compile(re.escape(m.key).replace("NAME", ".+").replace("K", r"\d+")), m)
        for m in every
        if re.search("NAME|K", m.key)
    ]
    # The longest first: NAME matches slashes as well, so eval/NAME would match eval/ocr/stderr.
    patterns.sort(key=lambda pair: -len(pair[1].key))
    return {metric.key: metric for metric in every}, patterns
