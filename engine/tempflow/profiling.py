"""NVTX ranges for profilers, and the iterations that `--profile START:STOP` records.

Ranges are in the domain "tempflow". Without a profiler attached a range costs two microseconds.
How to profile with nsys: docs/profiling.md.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import nvtx

from tempflow.errors import VALUE, UserError, shortened

DOMAIN = "tempflow"


@contextmanager
def span(name: str, **facts) -> Iterator[None]:
    """Mark a block as a range named `name`, followed by `key=value` for each fact."""
    message = " ".join([name, *(f"{key}={value}" for key, value in facts.items())])
    with nvtx.annotate(message, domain=DOMAIN, color="blue"):
        yield


class Profile:
    """Turns the CUDA profiler on for some iterations.

    For `nsys profile --capture-range=cudaProfilerApi`.

    Args:
        text: START:STOP, without the iteration STOP; None: never.

    Raises:
        UserError: the text is not two rising numbers.
    """

    def __init__(self, text: str | None):
        self.first = self.stop = -1
        if text is None:
            return
        first, colon, stop = text.partition(":")
        # int() raises for more than 4300 digits, so the length is checked first.
        numbers = first.isdecimal() and stop.isdecimal() and len(text) < 30
        if not (colon and numbers and int(first) < int(stop)):
            raise UserError(
                f"--profile {shortened(text, VALUE)}: expected START:STOP, iterations from 0 on,"
                " for example 2:4"
            )
        self.first, self.stop = int(first), int(stop)

    def before(self, iteration: int) -> None:
        """Call it before every iteration, counted from 0, and once after the last one."""
        import torch

        # -1, which no iteration has, where no profile was asked for.
        if iteration not in (self.first, self.stop) or not torch.cuda.is_available():
            return
        # Kernels of the iteration before must end outside the recorded range, or inside it.
        torch.cuda.synchronize()
        call = (
            torch.cuda.cudart().cudaProfilerStart
            if iteration == self.first
            else torch.cuda.cudart().cudaProfilerStop
        )
        call()
