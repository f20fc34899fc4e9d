"""The kinds of values that config keys take, with the ranges that are allowed everywhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
# and processes: each is made, whatever the machine has
Threads = Annotated[int, Field(ge=1, le=1024)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]  # a timer of more than 292 years is an error
Steps = Annotated[int, Field(ge=1, le=1000)]
Pixels = Annotated[int, Field(ge=1, le=16384)]
Frames = Annotated[int, Field(ge=1, le=4096)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Compile = Literal["eager", "compile", "compile-max"]


def _component(value: Any) -> Any:
    """Only the form; what `tempflow.registry` knows of it is checked once all other keys are
    right."""
    if (
        isinstance(value, str)
        and value
        or isinstance(value, dict)
        and all(isinstance(key, str) for key in value)
    ):
        return value
    raise PydanticCustomError(
        "component", 'expected an id, "module:Name" or a table {"type": ..., and its options}'
    )


Component = Annotated[Any, BeforeValidator(_component)]


class Section(BaseModel):
    # An empty text (`--set logging.name=$UNSET`) is no name, and is not taken for null.
    model_config = ConfigDict(
        extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False, str_min_length=1
    )
