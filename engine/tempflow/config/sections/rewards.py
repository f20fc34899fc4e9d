"""The worker processes that score images; the rewards themselves are read by `tempflow.rewards`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tempflow.config.fields import Count, Fraction, Seconds, Section, Threads


class RewardPoolSection(Section):
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        1, description="processes per rank; 0 scores in the training process"
    )
    threads_per_worker: Threads = Field(1, description="CPU threads of each")
    timeout_s: Seconds = Field(120.0, description="for one batch of one reward")
    start_timeout_s: Seconds = Field(
        300.0, description="for a worker to load (and download) its rewards' models"
    )
    retries: Count = Field(2, description="further tries of a failed batch")
    max_failed: Fraction = Field(
        0.5,
        description=(
            "share of an iteration's or an evaluation's images that may fail before the run stops"
        ),
    )

    def pool(self) -> dict[str, Any]:
        """What `RewardPool` takes."""
        return self.model_dump(exclude={"max_failed"})
