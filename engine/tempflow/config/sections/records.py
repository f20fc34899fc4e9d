"""What a run writes: checkpoints and logs, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from tempflow.config.fields import Count, Positive, Section


class Checkpoint(Section):
    """When checkpoints are saved, and which stay on disk."""

    every: Count = Field(20, description="iterations between checkpoints; 0: only at the end")
    keep: Positive = Field(2, description="how many of the newest checkpoints are kept")
    keep_best: bool = Field(
        True,
        description=(
            "also keep the checkpoint with the highest eval/reward, or the highest value of"
            " eval.stop.metric if eval.stop.patience is set"
        ),
    )


class Logging(Section):
    """Where the run directory is, and which trackers are written."""

    dir: str = Field("runs", description="folder that contains the run directories")
    name: str | None = Field(
        None,
        description=(
            "name of the run directory in `dir`; null: the config file's name without .json"
        ),
    )
    tensorboard: bool = Field(True, description="write TensorBoard event files")
    wandb: dict[str, Any] | None = Field(
        None,
        description="log to Weights & Biases with these arguments of wandb.init; null: do not",
    )

    @field_validator("dir", "name")
    @classmethod
    def _a_folder(cls, value: str | None, info) -> str | None:
        """Refuse names that are not a folder's, or that point outside logging.dir."""
        if value is None:
            return None
        # A NUL character would be a ValueError of the first file operation, an hour later.
        if not value.strip() or "\0" in value:
            raise PydanticCustomError("folder", "expected the name of a folder")
        path = Path(value)
        # Tools that list runs look below logging.dir only; "a/b" is fine, "../a" is not.
        if info.field_name == "name" and (
            not path.parts or ".." in path.parts or path.is_absolute()
        ):
            raise PydanticCustomError(
                "folder", "expected a name below logging.dir, without .. and not absolute"
            )
        return value
