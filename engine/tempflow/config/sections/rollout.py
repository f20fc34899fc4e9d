"""How latents are integrated: the plan, the stochastic step, sizes, and how the forwards run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tempflow.config.fields import (
    Compile,
    Component,
    Count,
    Fraction,
    Frames,
    Pixels,
    Positive,
    Section,
    Threads,
)
from tempflow.types import Scales, Size


class Suffix(Section):
    stride: Positive = Field(
        2, description="after its last decision a row takes every stride-th grid point"
    )
    order: Literal[1, 2] = Field(
        2,
        description=(
            "1: one Euler step; 2: extrapolated between forwards, and put right at the next one"
        ),
    )
    exact_steps: Count = Field(
        0, description="steps after the last decision that are taken exactly"
    )
    weights: Literal["same", "float8"] = Field(
        "same",
        description=(
            "float8: a copy of the transformer whose large layers multiply in float8 takes the"
            " others"
        ),
    )
    audit_every: Count = Field(
        0, description="iterations between comparisons with the exact suffix, as metrics; 0: never"
    )

    @model_validator(mode="after")
    def _coarser(self) -> Suffix:
        if self.stride == 1 and self.weights == "same":
            raise ValueError(
                'stride 1 changes nothing; allowed are 2 and more, 1 with weights "float8", or null'
                " for the exact suffix"
            )
        return self


class AdaptNoise(Section):
    step: Fraction = Field(
        0.02, description="how far the noise factor of a step moves in an iteration"
    )
    band: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description=(
            "children count as balanced, and the noise rises, where the shares better and worse"
            " differ by at most this"
        ),
    )


class Adapt(Section):
    steps: Positive | None = Field(
        None,
        description=(
            "branch steps drawn in each iteration, more often where rewards spread; null: all that"
            " the plan has"
        ),
    )
    noise: AdaptNoise | None = Field(
        None,
        description=(
            "calibrate each step's noise by the children better and worse than their state's own"
            " ODE; null: fixed"
        ),
    )

    @model_validator(mode="after")
    def _something(self) -> Adapt:
        if self.steps is None and self.noise is None:
            raise ValueError("set steps, noise or both, or leave it null")
        return self


class Rollout(Section):
    plan: Component = Field("tempflow", description="which rows take noise where")
    height: Pixels = Field(512, description="pixels")
    width: Pixels = Field(512, description="pixels")
    frames: Frames = Field(
        1, description="frames of a video, for families that make videos; 1: an image"
    )
    num_steps: Annotated[int, Field(ge=2, le=1000)] = Field(
        10, description="T, steps of the sampling grid"
    )
    sde: Component = Field("flow", description="the stochastic step")
    jitter: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description=(
            "how far the inner sigmas move at random in each iteration, in halves of the gap to the"
            " nearer neighbor; evaluations keep the checkpoint's own grid"
        ),
    )
    adapt: Adapt | None = Field(
        None,
        description="what the rewards of earlier iterations change in a rollout; null: nothing",
    )
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        3.5, description="as in the diffusers pipeline's call"
    )
    guidance_scale_2: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description=(
            "of the expert for low noise, where the model has two (Wan 2.2); null: guidance_scale"
        ),
    )
    micro_batch: Positive | None = Field(
        None, description="most rows in one forward of the rollout; null: measured at the start"
    )
    lanes: Threads | None = Field(
        None,
        description=(
            "parts of a rank's rollout that run side by side, in a thread each; null: on a CPU as"
            " many as cores"
        ),
    )
    decode_batch: Positive = Field(16, description="most latents decoded at once")
    suffix: Suffix | None = Field(
        None, description="coarser steps after a row's last decision; null: the exact ones"
    )
    graphs: bool = Field(
        False,
        description=(
            "replay forwards as CUDA graphs where there is a GPU, after a rehearsal; needs replica"
        ),
    )
    graph_limit_mb: Positive = Field(
        4096, description="device memory for graphs; the least recently used leave beyond it"
    )
    graph_verify: bool = Field(
        True, description="compare every graph's first replay with an eager forward"
    )
    compile: Compile = Field(
        "eager",
        description="torch.compile of the rollout copy's blocks; compile-max tunes kernels too",
    )
    replica: bool = Field(
        True,
        description="roll out on a static copy of the weights, not through the training engine",
    )
    refresh_bucket: Positive = Field(
        100_000_000, description="most weights gathered at a time when that copy is refreshed"
    )

    @property
    def scale(self) -> float:
        """Guidance scale of rollouts; `Scales` where the second expert has its own."""
        return (
            self.guidance_scale
            if self.guidance_scale_2 is None
            else Scales(self.guidance_scale, self.guidance_scale_2)
        )

    @property
    def size(self) -> Size:
        """Of the images or videos that are made, in rollouts and evaluations alike."""
        return Size(self.height, self.width, self.frames)

    @property
    def rows(self) -> int:
        """Most rows in one forward, where nothing was measured yet a guess."""
        return self.micro_batch or 48
