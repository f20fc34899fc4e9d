"""Types of config values, with the ranges that hold for every key of that type."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

# Larger numbers overflow shapes and counters of the libraries, far from the key that set them.
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
# All of them are started, whatever the machine has: 10^6 would bring it down.
Threads = Annotated[int, Field(ge=1, le=1024)]
# Python's timers overflow beyond 292 years, in the watchdog's thread, which then watches nothing.
Seconds = Annotated[float, Field(gt=0, le=1e6)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Pixels = Annotated[int, Field(ge=1, le=16384)]
Frames = Annotated[int, Field(ge=1, le=4096)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Compile = Literal["eager", "compile", "compile-max"]


def _component(value: Any) -> Any:
    """Check the form of a component's value.

    `checks.resolve_components` checks id and options once all other keys are known to be right:
    a plan, for example, is prepared with the number of steps.
    """
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
    """Base class of all sections: unknown keys and values of another type are refused."""

    # strict: "1" is no number and 1.0 no integer, so that a typo is not converted silently.
    # str_min_length: an empty text usually comes from a shell variable that is not set (`--set
    # logging.name=$UNSET`), and must not count as null.
    model_config = ConfigDict(
        extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False, str_min_length=1
    )
