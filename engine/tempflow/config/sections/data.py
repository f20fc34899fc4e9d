"""The prompts of training and evaluation, and which of them an iteration takes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from tempflow.config.fields import Fraction, Positive, Section


class HubDataset(Section):
    dataset: str = Field(description="what `datasets.load_dataset` takes: a hub id, or a folder")
    subset: str | None = Field(
        None, description="the dataset's configuration, where it has several"
    )
    split: str = Field("train", description="its split")
    column: str = Field(
        "prompt", description="the column of prompts; `negative_prompt` is read where there is one"
    )
    metadata: list[str] = Field([], description="further columns, for rewards that read them")
    images: list[str] = Field(
        [],
        description=(
            "columns of condition images, for families that edit; decoded at the start and kept"
        ),
    )
    revision: str | None = Field(None, description="commit or tag of a hub dataset")


class Curation(Section):
    spread: Fraction = Field(
        0.1,
        description=(
            "a prompt rests when its rewards spread less than this times the average prompt's,"
            " groups taken alone"
        ),
    )
    rest: Positive = Field(
        10, description="iterations that it is passed over for, before it is tried again"
    )
    prefer: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description=(
            "share of an iteration's prompts that are chosen for the highest spread seen so far,"
            " less its standard error"
        ),
    )


class Data(Section):
    train: str | HubDataset = Field(
        description=(
            "prompt file: .txt, one prompt a line, or .jsonl with `prompt`, `negative_prompt`,"
            " `image` or `images` (paths), and metadata; a folder with train.txt, train.jsonl or"
            " train_metadata.jsonl; or a dataset"
        )
    )
    heldout: str | HubDataset | None = Field(
        None, description="the same for evaluation, fixed during the run; of a folder the test file"
    )
    prompts_per_iteration: Positive = Field(8, description="different prompts drawn per iteration")
    curation: Curation | None = Field(
        None, description="pass over prompts that teach nothing for a while; null: all in turn"
    )
    embedding_cache: str | None = Field(
        None,
        description=(
            "folder of prompt embeddings; the text encoders leave memory once they are computed;"
            " null: they stay"
        ),
    )

    @field_validator("train", "heldout", mode="wrap")
    @classmethod
    def _file_or_dataset(cls, value, read):
        """A table's own errors, and one line for the rest."""
        if isinstance(value, dict):
            return HubDataset.model_validate(value)
        try:
            return read(value)
        except ValidationError:
            allowed = (
                'expected a file, a folder or a table {"dataset": ..., "split": ..., "column": ...}'
            )
            raise PydanticCustomError("prompts", allowed) from None
