"""Checks of the `eval` section against other keys, of the form of those in `checks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tempflow.errors import shown
from tempflow.run.metrics import DRIFT, describe

if TYPE_CHECKING:
    from tempflow.config.schema import Config


def check_eval(config: Config) -> None:
    """eval.precision_recall needs enough images, and its metrics need their names."""
    neighbors = config.eval.precision_recall
    if neighbors is None:
        return
    # An image is not its own neighbor, so k of them need k + 1 images.
    if neighbors >= config.eval.prompts:
        raise ValueError(
            f"eval.precision_recall: {neighbors} neighbors need at least {neighbors + 1} images;"
            f" eval.prompts is {config.eval.prompts}"
        )
    # A reward NAME is logged as eval/NAME, over the metric.
    for name in ("precision", "recall"):
        if name in config.rewards:
            raise ValueError(
                f"rewards.{name}: eval/{name} is a metric of eval.precision_recall; give the reward"
                " another name"
            )


def check_stop(config: Config) -> None:
    """eval.stop needs evaluations, a bound, and a metric that this run logs."""
    rule, plan = config.eval.stop, config.plan()
    if rule is None:
        return
    if not config.data.heldout or not config.eval.every:
        raise ValueError("eval.stop: there are no evaluations; set data.heldout and eval.every")
    if rule.patience is None and rule.below is None and rule.above is None:
        raise ValueError("eval.stop: never stops; set patience, below or above")
    # An unknown metric would never stop the run, so only those that this config logs are allowed.
    known = ["eval/reward", *(f"eval/{name}" for name in config.rewards)]
    known += ["kl"] if config.training.penalty else []
    # A distance needs two images: of two seeds, or of two children of a state.
    known += ["diversity/seeds"] if plan.seeds > 1 else []
    known += ["diversity/children"] if plan.children > 1 else []
    known += [key for key in DRIFT if key.startswith("drift/") or config.eval.precision_recall]
    if rule.metric not in known:
        raise ValueError(
            f"eval.stop.metric: {shown(rule.metric)}; expected one that this run logs:"
            f" {', '.join(known)}"
        )
    metric = describe(rule.metric)
    # patience waits for a new highest value, which would reward the run for drifting away.
    if rule.patience and metric and metric.better == "lower":
        raise ValueError(
            f"eval.stop.patience: waits for {rule.metric} to rise, but lower is better for it; use"
            " eval.stop.above"
        )
