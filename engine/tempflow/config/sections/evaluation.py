"""Evaluations on held-out prompts, and the rule by which they stop a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tempflow.config.fields import Count, Positive, Section, Steps


class Stop(Section):
    """Stop the run early by a metric."""

    metric: str = Field(
        description=(
            "metric to watch, at each evaluation: eval/reward, eval/NAME, kl, diversity/seeds,"
            " diversity/children, drift/color_shift, drift/color_spread, drift/diversity,"
            " eval/precision or eval/recall"
        )
    )
    patience: Positive | None = Field(
        None,
        description=(
            "stop after this many evaluations in a row without a new highest value; not allowed for"
            " metrics of which lower is better"
        ),
    )
    min_delta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="a value counts as a new highest if it exceeds the last by more than this"
    )
    # Bounds are compared with each value by itself; a NaN is in no bound and never stops a run.
    below: float | None = Field(None, description="stop when the metric is below this value")
    above: float | None = Field(None, description="stop when the metric is above this value")


class Eval(Section):
    """Evaluations on data.heldout, with the ODE and fixed noise."""

    every: Count = Field(10, description="iterations between evaluations; 0: no evaluation")
    num_steps: Steps | None = Field(None, description="ODE steps; null: rollout.num_steps")
    guidance_scale: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description=(
            "guidance scale, for both experts if the model has two; null: that of the rollout"
        ),
    )
    prompts: Positive = Field(128, description="number of held-out prompts, from the first on")
    keep_samples: Positive = Field(
        24, description="images saved per evaluation, of the first prompts"
    )
    precision_recall: Positive | None = Field(
        None,
        description=(
            "also measure eval/precision and eval/recall of the images against those of the base"
            " model, in balls that reach to the k-th nearest neighbor, with this k (for example"
            " 3); null: do not"
        ),
    )
    stop: Stop | None = Field(
        None, description="rule that ends the run early, after saving a checkpoint; null: none"
    )
