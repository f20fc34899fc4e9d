"""The metrics of metrics.jsonl: what each is called, what it says, and which way is better.

The report's charts, the stopping rule, the console and docs/metrics.md read this table. A metric
that is missing here works all the same: the report shows it under its key. NAME in a key stands for
a reward, K for a step's number.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A key of metrics.jsonl.

    limit: how far a monitor of drift may go before the images count as changed; see `changes`.
    change: what is then said of it; {} is its value.
    form: of the value where it is shown as text.
    """

    key: str
    title: str
    help: str
    better: Literal["higher", "lower"] | None = None
    limit: float | None = None
    change: str = ""
    form: str = ".2f"

    def beyond(self, value: float) -> bool:
        """Whether the value is past the limit."""
        return self.limit is not None and (
            value > self.limit if self.better == "lower" else value < self.limit
        )


HELDOUT = (
    Metric(
        "eval/reward",
        "Held-out reward",
        "weighted reward of the held-out images, from the averaged weights once there is an"
        " average; judge by this one",
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
        "of the differences over prompts; a gain within two of it is no difference",
    ),
    Metric("eval/scored", "Held-out images scored", "images of an evaluation that have a reward"),
    Metric(
        "eval/failed",
        "Failed held-out images",
        "images of an evaluation without a reward; they are in no mean",
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
        "mean of one reward alone, over the prompts that are for it",
        "higher",
    ),
    Metric("eval/NAME/stderr", "Its standard error", "over those prompts"),
    Metric("eval/NAME/scored", "Held-out images scored by NAME", "of those prompts"),
    Metric("eval/NAME/failed", "Held-out images failed by NAME", "of those prompts", "lower"),
)
DRIFTS = (
    Metric(
        "drift/color_shift",
        "Color shift",
        "distance of the mean color from the base's, in gray levels of 255; of the ink where the"
        " base's images have a plain background",
        "lower",
        15.0,
        "the mean color moved by {:.0f} of 255 gray levels",
        ".1f",
    ),
    Metric(
        "drift/color_spread",
        "Color spread",
        "how much the colors vary from prompt to prompt, over the base's",
        "higher",
        0.9,
        "colors vary only {:.2f} times as much as the base's",
    ),
    Metric(
        "drift/diversity",
        "Diversity",
        "mean pixel distance of two prompts' images, over the base's",
        "higher",
    ),
    Metric(
        "eval/precision",
        "Precision",
        "share of the images that lie among the base's (eval.precision_recall); falls with anything"
        " new, better images too",
        "higher",
    ),
    Metric(
        "eval/recall",
        "Recall",
        "share of the base's images that lie among those of now (eval.precision_recall); falls as"
        " images become alike",
        "higher",
        0.5,
        "only {:.0%} of the base's images lie among those of now",
    ),
)
TRAINING = (
    Metric(
        "kl",
        "KL to the reference",
        "mean over decisions; the price of the reward in distance from the base model",
        "lower",
    ),
    Metric(
        "clip_fraction",
        "Clip fraction",
        "share of children whose ratio left the range of the objective; of dppo and hinge, those"
        " that have no pull left",
    ),
    Metric(
        "ratio/max_dev",
        "Largest ratio deviation",
        "max |ratio − 1|; 0 with one update per rollout, by construction",
    ),
    Metric("grad_norm", "Gradient norm", "before gradient clipping"),
    Metric("loss", "Loss", "advantages are centered, so its level says little; jumps do"),
    Metric("lr", "Learning rate", "of the last update"),
)
SIGNAL = (
    Metric(
        "reward/zero_std_groups",
        "Groups without spread",
        "share of groups whose children all scored alike: nothing to learn there",
    ),
    Metric(
        "reward/std", "Reward spread", "standard deviation over the iteration's rewarded images"
    ),
    Metric(
        "prompts/skipped",
        "Prompts passed over",
        "share of the prompts met that rest for want of spread (data.curation)",
    ),
    Metric(
        "prompts/solved",
        "Prompts at rest, solved",
        "share of all prompts, with rewards above the average prompt's",
    ),
    Metric(
        "prompts/hopeless",
        "Prompts at rest, hopeless",
        "share of all prompts, with rewards below it",
    ),
    Metric(
        "reward/failed",
        "Failed rewards",
        "images whose reward could not be computed; masked out of their group",
        "lower",
    ),
)
DIVERSITY = (
    Metric(
        "diversity/seeds",
        "Difference between seeds",
        "mean pixel distance of a prompt's images of different noises; falls towards 0 as the"
        " policy collapses onto one image",
        "higher",
    ),
    Metric(
        "diversity/children",
        "Difference between children",
        "mean pixel distance of the images that one state's noise makes",
        "higher",
    ),
)
OTHERS = (
    Metric("reward/mean", "Training reward", "mean over the children of this iteration", "higher"),
    Metric(
        "reward/trunk", "Reward of the trunks", "mean over the samples that took no noise", "higher"
    ),
    Metric("reward/NAME", "Training NAME", "mean of one reward alone, unweighted", "higher"),
    Metric("reward/NAME/std", "Spread of NAME", "its standard deviation"),
    Metric(
        "reward_std/step_K",
        "Spread of branch step K",
        "of rewards within the groups of one branch step: where decisions matter",
    ),
    Metric(
        "adapt/p_step_K",
        "Chance of branch step K",
        "in a draw of steps, as this iteration had it (rollout.adapt)",
    ),
    Metric(
        "adapt/noise_K",
        "Noise of branch step K",
        "factor of its noise, as this iteration had it (rollout.adapt)",
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
        "of the rollout against the training engine with the same weights",
        "lower",
    ),
    Metric("updates/skipped", "Updates skipped", "because their gradient was not finite", "lower"),
    Metric(
        "suffix/reward_rank_correlation",
        "Suffix: rewards",
        "rank correlation of coarse and exact suffix",
        "higher",
    ),
    Metric(
        "suffix/advantage_rank_correlation",
        "Suffix: advantages",
        "the same, of the advantages",
        "higher",
    ),
    Metric("images", "Images", "rewarded in the iteration"),
    Metric("images/total", "Images so far", "rewarded since the run began"),
    Metric("forwards/rollout", "Rollout forwards", "rows forwarded by the rollout, all ranks"),
    Metric("forwards/train", "Training forwards", "rows forwarded by the updates, all ranks"),
    Metric("rollout/rows_per_forward", "Rows per forward", "of the rollout, on average"),
    Metric("rollout/peak_latents", "Latents held", "at most at a time"),
    Metric("rollout/padded_rows", "Padded rows", "forwarded to fill a CUDA graph's batch"),
    Metric("time/rollout", "Seconds: rollout", "denoising"),
    Metric("time/decode", "Seconds: decoding", "latents to images"),
    Metric("time/reward", "Seconds: reward", "left to wait for after the rollout"),
    Metric("time/reward_busy", "Seconds: reward workers", "worked meanwhile, all workers together"),
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
    """The metric of a key, exactly or by its pattern; None for one that the table does not have."""
    exact, patterns = _table()
    return exact.get(key) or next(
        (metric for pattern, metric in patterns if pattern.fullmatch(key)), None
    )


def changes(values: dict) -> list[str]:
    """What of the images has changed from the base's beyond the limits, a clause each. values: a
    row of metrics or a summary."""
    return [metric.change.format(value) for metric, value in drifts(values) if metric.beyond(value)]


def drift_texts(values: dict, beyond: bool = False) -> list[str]:
    """Each monitor of drift that a row of metrics or a summary has, with its value, and with its
    limit where it is past that. beyond: only those past their limits."""
    return [
        f"{metric.title.lower()} {value:{metric.form}}"
        + (f" (limit {metric.limit:g})" if metric.beyond(value) else "")
        for metric, value in drifts(values)
        if metric.beyond(value) or not beyond
    ]


def drifts(values: dict) -> list[tuple[Metric, float]]:
    """The monitors of drift that a row of metrics or a summary has, with their values."""
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
    patterns.sort(key=lambda pair: -len(pair[1].key))  # eval/NAME/stderr before eval/NAME
    return {metric.key: metric for metric in every}, patterns
