"""Names for what a profiler sees: NVTX ranges in the domain "tempflow", and the bracket for
`--profile START:STOP`.

Without a profiler attached a range costs two microseconds. Use: nsys profile -t cuda,nvtx, see
docs/profiling.md.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import nvtx

from tempflow.errors import VALUE, UserError, shortened

DOMAIN = "tempflow"


@contextmanager
def span(name: str, **facts) -> Iterator[None]:
    """A named range around a block; facts are appended as `key=value`."""
    message = " ".join([name, *(f"{key}={value}" for key, value in facts.items())])
    with nvtx.annotate(message, domain=DOMAIN, color="blue"):
        yield


class Profile:
    """Iterations between which the CUDA profiler runs, START:STOP with STOP excluded; nothing where
    text is None.

    For `nsys profile --capture-range=cudaProfilerApi`. Raises UserError for anything else than two
    rising numbers.
    """

    def __init__(self, text: str | None):
        self.first = self.stop = -1
        if text is None:
            return
        first, colon, stop = text.partition(":")
        # more digits than that are not read at all
        numbers = first.isdecimal() and stop.isdecimal() and len(text) < 30
        if not (colon and numbers and int(first) < int(stop)):
            raise UserError(
                f"--profile {shortened(text, VALUE)}: expected START:STOP, iterations from 0 on,"
                " for example 2:4"
            )
        self.first, self.stop = int(first), int(stop)

    def before(self, iteration: int) -> None:
        """To be called before every iteration, counted from 0, and once after the last."""
        import torch

        if iteration not in (self.first, self.stop) or not torch.cuda.is_available():
            return
        torch.cuda.synchronize()
        call = (
            torch.cuda.cudart().cudaProfilerStart
            if iteration == self.first
            else torch.cuda.cudart().cudaProfilerStop
        )
        call()
