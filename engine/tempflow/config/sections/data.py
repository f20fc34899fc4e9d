"""Which prompts are used for training and evaluation, and how an iteration chooses among them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from tempflow.config.fields import Fraction, Positive, Section


class HubDataset(Section):
    """A dataset of the Hugging Face Hub, or a folder that `datasets` reads."""

    dataset: str = Field(description="hub id or folder, for `datasets.load_dataset`")
    subset: str | None = Field(
        None, description="configuration of the dataset; null: it has only one"
    )
    split: str = Field("train", description="split of the dataset")
    column: str = Field(
        "prompt",
        description="column with the prompts; a column `negative_prompt` is read too if present",
    )
    metadata: list[str] = Field(
        [], description="further columns, which are passed to rewards as metadata"
    )
    images: list[str] = Field(
        [],
        description=(
            "columns with condition images, for families that edit; decoded at the start and kept"
            " in memory"
        ),
    )
    revision: str | None = Field(
        None, description="commit or tag of a hub dataset; null: the newest"
    )


class Curation(Section):
    """Skip prompts whose rewards hardly differ within a group, because they have no gradient."""

    spread: Fraction = Field(
        0.1,
        description=(
            "skip a prompt whose rewards have a standard deviation within groups of less than this"
            " times the average over prompts"
        ),
    )
    rest: Positive = Field(
        10, description="iterations for which such a prompt is skipped, before it is tried again"
    )
    prefer: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description=(
            "share of an iteration's prompts that are chosen by the highest standard deviation seen"
            " so far, minus its standard error; the others come in turn"
        ),
    )


class Data(Section):
    train: str | HubDataset = Field(
        description=(
            "training prompts: a .txt file with one prompt a line; a .jsonl file with `prompt`,"
            " `negative_prompt`, `image` or `images` (paths), and metadata; a folder with"
            " train.txt, train.jsonl or train_metadata.jsonl; or a table that names a dataset"
        )
    )
    heldout: str | HubDataset | None = Field(
        None,
        description=(
            "held-out prompts, given in the same way (in a folder the file named test instead of"
            " train); null: no evaluation"
        ),
    )
    prompts_per_iteration: Positive = Field(8, description="different prompts in each iteration")
    curation: Curation | None = Field(
        None,
        description=(
            "skip prompts for a while whose rewards hardly differ within a group; null: use all in"
            " turn"
        ),
    )
    embedding_cache: str | None = Field(
        None,
        description=(
            "folder for prompt embeddings; the text encoders are removed from memory once all"
            " prompts are embedded; null: they stay in memory, and nothing is written"
        ),
    )

    @field_validator("train", "heldout", mode="wrap")
    @classmethod
    def _file_or_dataset(cls, value, read):
        """Report errors of a dataset's table by key, and anything else in one line."""
        # Pydantic would report one error for each member of the union, in terms of its types.
        if isinstance(value, dict):
            return HubDataset.model_validate(value)
        try:
            return read(value)
        except ValidationError:
            allowed = (
                'expected a file, a folder or a table {"dataset": ..., "split": ..., "column": ...}'
            )
            raise PydanticCustomError("prompts", allowed) from None
