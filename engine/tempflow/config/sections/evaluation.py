"""Evaluations on held-out prompts, and the rule by which they end a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tempflow.config.fields import Count, Positive, Section, Steps


class Stop(Section):
    metric: str = Field(
        description=(
            "a metric of the evaluated iterations: eval/reward, eval/NAME, kl, diversity/seeds,"
            " diversity/children, drift/color_shift, drift/color_spread, drift/diversity,"
            " eval/precision, eval/recall"
        )
    )
    patience: Positive | None = Field(
        None,
        description=(
            "stop after this many evaluations in a row without a new highest value; not where lower"
            " is better"
        ),
    )
    min_delta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="a new highest value is higher than the last by more than this"
    )
    below: float | None = Field(None, description="stop as soon as an evaluation finds it lower")
    above: float | None = Field(None, description="stop as soon as an evaluation finds it higher")


class Eval(Section):
    every: Count = Field(10, description="iterations between evaluations; 0: never")
    num_steps: Steps | None = Field(None, description="ODE steps; null: as in the rollout")
    guidance_scale: Annotated[float, Field(ge=0)] | None = Field(
        None, description="of all experts of the model; null: as in the rollout"
    )
    prompts: Positive = Field(128, description="held-out prompts used, from the top of the file")
    keep_samples: Positive = Field(
        24, description="images written per evaluation, the first prompts'"
    )
    precision_recall: Positive | None = Field(
        None,
        description=(
            "k of the k-nearest-neighbor balls of eval/precision and eval/recall against the base's"
            " images, e.g. 3; null: off"
        ),
    )
    stop: Stop | None = Field(
        None, description="ends the run early by a metric; a checkpoint is saved"
    )
