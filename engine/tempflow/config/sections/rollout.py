"""How images are sampled in training: the plan, the stochastic step, sizes and how forwards run."""

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
    """The steps of a row after its last noise, which only lead to the image that is scored."""

    stride: Positive = Field(
        2, description="number of grid steps that are joined into one after a row's last noise"
    )
    order: Literal[1, 2] = Field(
        2,
        description=(
            "order of a joined step. 1: one Euler step; 2: velocities are extrapolated over the"
            " step, and corrected after the next forward"
        ),
    )
    exact_steps: Count = Field(
        0, description="steps right after the last noise that are not joined"
    )
    weights: Literal["same", "float8"] = Field(
        "same",
        description=(
            "float8: run the steps after the exact ones on a copy of the transformer whose large"
            " linear layers use float8; same: on the rollout's own weights"
        ),
    )
    audit_every: Count = Field(
        0,
        description=(
            "iterations between comparisons with exact suffixes, which are logged as metrics; 0:"
            " none"
        ),
    )

    # Checked here and not with the other cross-checks, because --suffix of refine reads a Suffix by
    # itself.
    @model_validator(mode="after")
    def _coarser(self) -> Suffix:
        if self.stride == 1 and self.weights == "same":
            raise ValueError(
                'stride 1 changes nothing; allowed are 2 or more, 1 with weights "float8", or null'
                " instead of the table for exact steps"
            )
        return self


class AdaptNoise(Section):
    """Adjust the noise of each step by how many children are better than without noise."""

    step: Fraction = Field(
        0.02, description="change of a step's noise factor, which starts at 1, in one iteration"
    )
    band: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description=(
            "the noise rises if the shares of better and of worse children differ by at most this,"
            " and otherwise falls"
        ),
    )


class Adapt(Section):
    """What a rollout learns from the rewards of earlier iterations."""

    steps: Positive | None = Field(
        None,
        description=(
            "number of branch steps drawn in each iteration, with higher probability where rewards"
            " differ more; null: all branch steps of the plan"
        ),
    )
    noise: AdaptNoise | None = Field(
        None,
        description=(
            "adjust the noise of each step by comparing the children with the ODE sample of their"
            " state; null: fixed noise"
        ),
    )

    @model_validator(mode="after")
    def _something(self) -> Adapt:
        if self.steps is None and self.noise is None:
            raise ValueError("set steps, noise or both, or null instead of the table")
        return self


class Rollout(Section):
    """How the images of an iteration are sampled."""

    plan: Component = Field(
        "tempflow", description="which rows are sampled, and which steps of a row take noise"
    )
    height: Pixels = Field(512, description="height of the images in pixels")
    width: Pixels = Field(512, description="width of the images in pixels")
    frames: Frames = Field(
        1, description="frames of a video, for model families that make videos; 1: an image"
    )
    # At least 2: the last step takes no noise, so a single step would leave nothing to train on.
    num_steps: Annotated[int, Field(ge=2, le=1000)] = Field(
        10, description="T, the number of steps of the sampling grid"
    )
    sde: Component = Field(
        "flow", description="formula of the steps that take noise (stochastic steps)"
    )
    jitter: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description=(
            "move the inner sigmas of the grid at random in each iteration, by at most this times"
            " half the gap to the nearer neighbor; evaluations use the unchanged grid"
        ),
    )
    adapt: Adapt | None = Field(
        None,
        description="adapt branch steps or noise to rewards of earlier iterations; null: do not",
    )
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        3.5, description="guidance scale, as the diffusers pipeline takes it"
    )
    guidance_scale_2: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description=(
            "guidance scale of the expert for low noise, in models with two experts (Wan 2.2);"
            " null: guidance_scale"
        ),
    )
    micro_batch: Positive | None = Field(
        None, description="most rows in one forward of the rollout; null: measured at the start"
    )
    lanes: Threads | None = Field(
        None,
        description=(
            "number of threads per rank, each of which samples a part of the rows; null: one per"
            " core on a CPU, one on a GPU"
        ),
    )
    decode_batch: Positive = Field(16, description="most latents decoded at once")
    suffix: Suffix | None = Field(
        None, description="coarser steps after a row's last noise; null: exact steps"
    )
    graphs: bool = Field(
        False,
        description=(
            "on a GPU, replay forwards as CUDA graphs, if a rehearsal at the start succeeds; needs"
            " `replica`"
        ),
    )
    graph_limit_mb: Positive = Field(
        4096,
        description="device memory for graphs; beyond it the least recently used are deleted",
    )
    graph_verify: bool = Field(
        True, description="compare the first replay of every graph with an eager forward"
    )
    compile: Compile = Field(
        "eager",
        description=(
            "compile the blocks of the rollout copy with torch.compile; compile-max also tunes"
            " kernels"
        ),
    )
    replica: bool = Field(
        True,
        description=(
            "sample with a copy of the weights (the rollout copy) instead of the training engine's"
        ),
    )
    refresh_bucket: Positive = Field(
        100_000_000,
        description="most weights gathered at a time when the rollout copy is updated",
    )

    @property
    def scale(self) -> float:
        """Guidance scale of rollouts; a `Scales` if the second expert has its own."""
        return (
            self.guidance_scale
            if self.guidance_scale_2 is None
            else Scales(self.guidance_scale, self.guidance_scale_2)
        )

    @property
    def size(self) -> Size:
        """Size of the images or videos, in rollouts and in evaluations."""
        return Size(self.height, self.width, self.frames)

    @property
    def rows(self) -> int:
        """Most rows in one forward."""
        # The dry run, and a run before its measurement, need a number for null.
        return self.micro_batch or 48
