"""What an update minimizes, how often, and which average of the weights is kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from tempflow.config.fields import Compile, Component, Count, Fraction, Positive, Section


class Ema(Section):
    decay: Fraction = Field(0.9, description="weight of the old average")
    every: Positive = Field(8, description="updates between two averagings")


class Merge(Section):
    last: Annotated[int, Field(ge=2, le=1000)] = Field(
        8, description="snapshots kept; memory and checkpoints hold each in fp32"
    )
    every: Positive = Field(6, description="updates between two snapshots")
    shape: Literal["sqrt", "mean", "linear"] = Field(
        "sqrt",
        description=(
            "the decay that the sum stands for: 1 - sqrt, or a linear one, whose sum is the mean"
        ),
    )


class Updates(Section):
    passes: Positive = Field(1, description="times that an iteration goes over its states")
    parts: Positive = Field(
        1, description="disjoint shares of the states in a pass, an optimizer step each"
    )


class ValueWeights(Section):
    value: Annotated[float, Field(gt=0, le=1)] = Field(
        description="discount gamma of VGPO; 1: the plain number of steps that are left"
    )


class Training(Section):
    iterations: Positive = Field(100, description="rollouts, each followed by its updates")
    minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="stop after this much training, if sooner"
    )
    updates: Updates = Field(Updates(), description="optimizer steps of an iteration")
    max_skipped: Count = Field(
        3,
        description=(
            "updates in a row that may be skipped because the gradient is not finite, before the"
            " run stops"
        ),
    )
    micro_batch: Positive | None = Field(
        None, description="states in one forward and backward; null: measured at the start"
    )
    advantage: Component = Field("group", description="from rewards to advantages")
    objective: Component = Field("grpo", description="what an update minimizes")
    penalty: Component | None = Field(
        None,
        description=(
            "what holds the policy to the one before training, or to that before an iteration's"
            " updates; null: nothing"
        ),
    )
    weighting: Literal["noise", "uniform", "guard"] | ValueWeights = Field(
        "noise",
        description=(
            "loss weight of a step. noise makes its gradient as large as the step's b, whatever the"
            " objective's ratio; guard as b / dt, about the same for all steps; uniform leaves it;"
            " a table as noise, times the discounted number of steps left"
        ),
    )
    compile: Compile = Field(
        "eager",
        description="torch.compile of the trained transformer's blocks; not with ZeRO stage 3",
    )
    reference: Literal["whole", "sharded", "offloaded"] | None = Field(
        None,
        description=(
            "the reference policy of full fine-tuning: a copy on each GPU, one over all, or one in"
            " host memory; null: sharded at ZeRO stage 3, else whole"
        ),
    )
    ema: Ema | None = Field(
        None, description="average of the trained weights, evaluated and exported where present"
    )
    merge: Merge | None = Field(
        None,
        description=(
            "weighted sum of the last snapshots of the trained weights, in place of a decay and of"
            " `ema`; used as `ema` is"
        ),
    )
    lr_decay: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="learning rate at the end over that at the start, along a cosine; 1: constant",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of prompts and noise")

    @field_validator("weighting", mode="wrap")
    @classmethod
    def _profile_or_table(cls, value, read):
        """A table's own errors, and one line for the rest."""
        if isinstance(value, dict):
            return ValueWeights.model_validate(value)
        try:
            return read(value)
        except ValidationError:
            raise PydanticCustomError(
                "weighting", 'expected "noise", "uniform", "guard" or {"value": gamma}'
            ) from None

    def profile(self) -> dict[str, Any]:
        """Which loss weights the steps have: `weighting`, and `gamma` of the profile that has
        it."""
        if isinstance(self.weighting, ValueWeights):
            return {"weighting": "value", "gamma": self.weighting.value}
        return {"weighting": self.weighting}

    @property
    def states(self) -> int:
        """Most states in one forward and backward, where nothing was measured yet a guess."""
        return self.micro_batch or 8
