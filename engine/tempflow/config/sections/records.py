"""What a run leaves behind: checkpoints, logs and where they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from tempflow.config.fields import Count, Positive, Section


class Checkpoint(Section):
    every: Count = Field(20, description="iterations between checkpoints; 0: only at the end")
    keep: Positive = Field(2, description="newest checkpoints kept")
    keep_best: bool = Field(
        True,
        description=(
            "of those evaluated keep the best as well: by eval/reward, or what eval.stop waits for"
        ),
    )


class Logging(Section):
    dir: str = Field("runs", description="folder of run directories")
    name: str | None = Field(
        None, description="run directory, below `dir`; null: the config file's name"
    )
    tensorboard: bool = Field(True, description="write TensorBoard events")
    wandb: dict[str, Any] | None = Field(None, description="arguments of wandb.init, or null")

    @field_validator("dir", "name")
    @classmethod
    def _a_folder(cls, value: str | None, info) -> str | None:
        """A name that leaves logging.dir would put the run where nobody looks for it."""
        if value is None:
            return None
        if not value.strip() or "\0" in value:
            raise PydanticCustomError("folder", "expected the name of a folder")
        path = Path(value)
        if info.field_name == "name" and (
            not path.parts or ".." in path.parts or path.is_absolute()
        ):
            raise PydanticCustomError(
                "folder", "expected a name below logging.dir, without .. and not absolute"
            )
        return value
