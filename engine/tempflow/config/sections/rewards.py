"""The worker processes that score images.

The section `rewards`, with one entry per reward, is read by `tempflow.rewards`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tempflow.config.fields import Count, Fraction, Seconds, Section, Threads


class RewardPoolSection(Section):
    """The pool of worker processes of each rank."""

    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="worker processes per rank; 0: score in the training process"
    )
    threads_per_worker: Threads = Field(1, description="CPU threads per worker")
    timeout_s: Seconds = Field(120.0, description="time limit for one batch of one reward")
    start_timeout_s: Seconds = Field(
        300.0, description="time limit for a worker to download and load its rewards' models"
    )
    retries: Count = Field(2, description="how often a failed batch is tried again")
    max_failed: Fraction = Field(
        0.5,
        description=(
            "stop the run if a larger share of the images of an iteration or evaluation has no"
            " reward"
        ),
    )

    def pool(self) -> dict[str, Any]:
        """The keyword arguments of `RewardPool`."""
        return self.model_dump(exclude={"max_failed"})
