"""What an update minimizes, how many updates there are, and which average of weights is kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from tempflow.config.fields import Compile, Component, Count, Fraction, Positive, Section


class Ema(Section):
    """An exponential moving average of the trained weights."""

    decay: Fraction = Field(
        0.9, description="weight of the old average when the current weights are added"
    )
    every: Positive = Field(8, description="updates between two additions to the average")


class Merge(Section):
    """A weighted sum of snapshots, which replaces a learning-rate decay (WSM, arXiv 2507.17634)."""

    last: Annotated[int, Field(ge=2, le=1000)] = Field(
        8, description="number of snapshots; each is kept in fp32, in memory and in checkpoints"
    )
    every: Positive = Field(6, description="updates between two snapshots")
    shape: Literal["sqrt", "mean", "linear"] = Field(
        "sqrt",
        description=(
            "learning-rate decay that the weighted sum replaces. sqrt: 1 - sqrt(share of the"
            " window); linear or mean: a linear decay, which gives all snapshots equal weights"
        ),
    )
    scale: Annotated[float, Field(ge=1, le=4)] = Field(
        1.0,
        description=(
            "how far the sum is taken from the weights before training, as a factor of its distance"
            " (ExPO, arXiv 2404.16792); above 1 a copy of these is kept in memory"
        ),
    )


class Updates(Section):
    """How many optimizer steps an iteration makes: passes times parts."""

    passes: Positive = Field(1, description="how often an iteration trains on all of its states")
    parts: Positive = Field(
        1, description="number of disjoint parts of the states, with an optimizer step for each"
    )


class ValueWeights(Section):
    """The loss weights of VGPO (arXiv 2512.12387)."""

    value: Annotated[float, Field(gt=0, le=1)] = Field(
        description=(
            "weights of VGPO: as noise, times the number of remaining steps, discounted by this"
            " gamma; 1: not discounted"
        )
    )


class Training(Section):
    """The updates of a run."""

    iterations: Positive = Field(
        100, description="number of iterations: a rollout and its updates each"
    )
    minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="stop earlier, after this many minutes of training; null: no limit"
    )
    # With several updates the later ones are off-policy, so this changes what is learned.
    updates: Updates = Field(Updates(), description="optimizer steps of an iteration")
    max_skipped: Count = Field(
        3,
        description=(
            "stop the run if more updates in a row are skipped because their gradient is not finite"
        ),
    )
    micro_batch: Positive | None = Field(
        None, description="most states in one forward and backward; null: measured at the start"
    )
    advantage: Component = Field("group", description="how advantages are computed from rewards")
    objective: Component = Field("grpo", description="the loss that an update minimizes")
    penalty: Component | None = Field(
        None,
        description=(
            "divergence from the policy before training, or before the iteration's updates, that is"
            " added to the loss; null: none"
        ),
    )
    weighting: Literal["noise", "uniform", "guard"] | ValueWeights = Field(
        "noise",
        description=(
            "loss weight of each step. noise: its gradient is proportional to the step's noise"
            " scale b; guard: to b / dt, which is about equal for all steps; uniform: weight 1; a"
            " table: as noise, times the discounted number of remaining steps"
        ),
    )
    compile: Compile = Field(
        "eager",
        description=(
            "compile the blocks of the trained transformer with torch.compile; at ZeRO stage 3 only"
            " eager is allowed"
        ),
    )
    reference: Literal["whole", "sharded", "offloaded"] | None = Field(
        None,
        description=(
            "where full fine-tuning keeps the reference policy. whole: a copy on each GPU; sharded:"
            " one copy spread over all GPUs; offloaded: in host memory; null: sharded at ZeRO stage"
            " 3, else whole"
        ),
    )
    ema: Ema | None = Field(
        None,
        description=(
            "keep a moving average of the trained weights, which is evaluated and exported in their"
            " place; null: none"
        ),
    )
    merge: Merge | None = Field(
        None,
        description=(
            "keep a weighted sum of snapshots of the trained weights, which is evaluated and"
            " exported in their place; it replaces a learning-rate decay, and excludes `ema`; null:"
            " none"
        ),
    )
    lr_decay: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description=(
            "factor that the learning rate reaches at the end, along half a cosine; 1: constant"
            " rate"
        ),
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="seed of the order of prompts and of all noise"
    )

    @field_validator("weighting", mode="wrap")
    @classmethod
    def _profile_or_table(cls, value, read):
        """Report errors of a table by key, and anything else in one line."""
        # Pydantic would report one error for each member of the union, in terms of its types.
        if isinstance(value, dict):
            return ValueWeights.model_validate(value)
        try:
            return read(value)
        except ValidationError:
            raise PydanticCustomError(
                "weighting", 'expected "noise", "uniform", "guard" or {"value": gamma}'
            ) from None

    def profile(self) -> dict[str, Any]:
        """The keyword arguments of `step_weights`: `weighting`, and `gamma` for "value"."""
        if isinstance(self.weighting, ValueWeights):
            return {"weighting": "value", "gamma": self.weighting.value}
        return {"weighting": self.weighting}

    @property
    def states(self) -> int:
        """Most states in one forward and backward."""
        # The dry run, and a run before its measurement, need a number for null.
        return self.micro_batch or 8
