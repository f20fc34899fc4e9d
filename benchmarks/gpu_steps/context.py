"""What a step is given: the device, whether it is a rehearsal, and where to write its findings."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from pathlib import Path
from typing import Callable

import torch

from tempflow.run.logs import write_atomic

ROOT = Path(__file__).parents[2]


class Skipped(Exception):
    """A step has nothing to do on this machine; the message says why."""


class Context:
    """The environment of a step.

    Args:
        file: the file of findings. It is rewritten with each finding, so that a step that is killed
            leaves those it had made.
        rehearse: whether the step's code runs on a CPU, at sizes that say nothing about a GPU.
    """

    def __init__(self, file: Path, rehearse: bool):
        self.file, self.rehearse = file, rehearse
        self.scratch = file.parent
        self.device = torch.device("cpu" if rehearse else "cuda:0")
        # of weights; many CPUs compute bf16 very slowly
        self.dtype = torch.float32 if rehearse else torch.bfloat16
        self._found = {"status": "running", "reason": None, "result": {}, "proved": []}

    def note(self, **found) -> None:
        """Add findings (JSON values). `headline` is the step's line in the summary; `table` has
        rows for the summary, as dictionaries with the same keys."""
        self._found["result"] |= found
        self._write()

    def prove(self, *paths: str) -> None:
        """Record that these paths of hardware.json have run here correctly. A rehearsal records
        none."""
        if self.rehearse:
            return
        self._found["proved"] += [path for path in paths if path not in self._found["proved"]]
        self._write()

    def run(self, function: Callable[[Context], None]) -> None:
        """Run a step, and write down how it ended; nothing is raised."""
        try:
            function(self)
            self._end("rehearsed" if self.rehearse else "ok")
        except Skipped as why:
            self._end("skipped", str(why))
        except torch.OutOfMemoryError as error:
            self._end("out of memory", str(error).splitlines()[0])
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self._end("failed", f"{type(error).__name__}: {error}".strip()[:2000])

    def _end(self, status: str, reason: str | None = None) -> None:
        self._found |= {"status": status, "reason": reason}
        self._write()

    def _write(self) -> None:
        write_atomic(self.file, json.dumps(self._found, indent=1))

    # ------------------------------------------------------------------------------------ measuring
    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], repeats: int = 3) -> float:
        """The median time of a call in seconds, after one call to warm up."""
        function()
        taken = []
        for _ in range(1 if self.rehearse else repeats):
            self.synchronize()
            started = time.perf_counter()
            function()
            self.synchronize()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def allocated(self) -> int | None:
        """Bytes of tensors on the card now; None without a card."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else None

    def peak_of(self, function: Callable[[], object]) -> tuple[object, int | None]:
        """(what a call returns, the most bytes that it allocated beyond what was allocated before;
        None without a card)."""
        if self.device.type != "cuda":
            return function(), None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before


def ratio(measured: float | None, expected: float) -> float | None:
    """Measured over expected; None if nothing was measured."""
    return None if measured is None else round(measured / expected, 3)
