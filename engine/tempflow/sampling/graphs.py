"""CUDA graphs of the rollout's forwards: captured once per set of input shapes, replayed from
static buffers.

A replay costs one launch instead of some thousand. It reads the weights at their addresses during
the capture, so weights must be refreshed in place; `watch` notices if they were not, and drops the
graphs.

A failed capture cannot be undone in its process. `torch.cuda.graph` then leaves the capture's
stream as the current one (2.13), and `CUDAGraph::capture_end` may leave the allocator in the state
of a capture (fixed in parts in 2.12 and later), so that the next `empty_cache` or capture ends in
an internal assertion. So a capture begins only after an eager run in which anything that makes the
host wait is an error. A function that fails there keeps running eagerly, and the reason is noted
once; a failure in the capture itself ends the run.
"""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterable

import torch

from tempflow.errors import RankError, brief, counted

Inputs = dict[str, torch.Tensor]
Function = Callable[..., tuple]


# How often the graph of a shape may be dropped for lack of memory before the shape runs eagerly:
# captures would take longer than replays save.
TURNS = 2
# Relative difference that is allowed between a replay and an eager run, by dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class CannotCapture(Exception):
    """A function would fail in a capture. It is raised before the capture begins, so nothing is
    broken."""


@dataclass
class Captured:
    """A captured call."""

    inputs: Inputs
    """Static buffers that `replay` reads."""
    outputs: tuple
    """Static buffers that `replay` writes."""
    replay: Callable[[], None]
    nbytes: int
    """Device memory that it holds."""


class CudaCapture:
    """Captures functions on the current device. All graphs share one memory pool, because only one
    runs at a time.

    A call raises CannotCapture before a capture begins, and any other error if one has failed.
    """

    WARM_UP = 2  # eager runs before, which create lazy workspaces and compile kernels

    def __init__(self):
        self._pool = None

    def __call__(self, function: Function, inputs: Inputs) -> Captured:
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        try:
            self._warm_up(function, static)
        except Exception as error:  # drivers, kernels and models raise errors of many types
            raise CannotCapture(_in_words(error)) from error
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # `torch.cuda.graph` itself begins with these two. Done before, so that the difference in
        # reserved memory is what the capture reserves.
        gc.collect()
        torch.cuda.empty_cache()
        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        with _stream_kept():
            # "thread_local", because NCCL's watchdog queries events in a thread of its own, which
            # would invalidate a "global" capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = tuple(function(**static))
        held = sum(t.numel() * t.element_size() for t in static.values())
        return Captured(static, outputs, graph.replay, held + torch.cuda.memory_reserved() - before)

    def _warm_up(self, function: Function, static: Inputs) -> None:
        # On another stream than the current one, as captures run.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                function(**static)
            with _waiting_is_an_error():
                function(**static)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()


@contextmanager
def _waiting_is_an_error():
    """Inside the context, an operation that makes the host wait for the GPU raises. A capture would
    fail at it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _stream_kept():
    """Restore the current stream after a failed capture, which leaves its own as the current
    one."""
    before = torch.cuda.current_stream()
    try:
        yield
    except Exception:
        torch.cuda.set_stream(before)
        raise


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {brief(error)}"


class GraphCache:
    """Runs functions of tensors by replaying their captured graphs: `cache(function, inputs)`
    returns what `function(**inputs)` does.

    A call raises RankError if a capture has begun and failed.

    Args:
        capture: capture(function, inputs) returns a `Captured`, or raises CannotCapture for a
            function that must run eagerly.
        limit_bytes: device memory of all graphs. Above it the least recently used are dropped; a
            shape whose graph was dropped `TURNS` times runs eagerly from then on.
        verify: compare the first replay of each graph with an eager run.
        note: called with a line of text about what is not captured, and why.
    """

    def __init__(
        self,
        capture: Callable[[Function, Inputs], Captured],
        *,
        limit_bytes: int,
        verify: bool,
        note: Callable[[str], None],
    ):
        self._capture, self._limit, self._verify, self._note = capture, limit_bytes, verify, note
        self._graphs: OrderedDict[tuple, Captured] = OrderedDict()
        self._refused: set[tuple] = set()
        self._left: Counter[tuple] = Counter()  # how often each graph was dropped to make room
        self._weights: tuple[int, ...] = ()
        self.captures = self.replays = 0

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Device memory of all graphs, in bytes."""
        return sum(captured.nbytes for captured in self._graphs.values())

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Drop all graphs if weights have moved in memory. Call it before each rollout with all
        weights that it reads."""
        weights = tuple(tensor.data_ptr() for tensor in tensors)
        if self._graphs and weights != self._weights:
            self._note(
                "rollout.graphs: the weights have moved in memory; graphs are captured again"
            )
            self._graphs.clear()
        self._weights = weights

    @torch.no_grad()
    def __call__(self, function: Function, inputs: Inputs) -> tuple:
        shapes = tuple(
            (name, tensor.shape, tensor.dtype, tensor.device)
            for name, tensor in sorted(inputs.items())
        )
        # By name, since each rollout makes a new `Denoise` with methods of the same name; by expert
        # too, since that decides which weights the function reads.
        key = (
            function.__qualname__,
            getattr(getattr(function, "__self__", None), "expert", 0),
            shapes,
        )
        if key in self._refused:
            return function(**inputs)
        captured = self._graphs.get(key)
        if captured is None and self._left[key] == TURNS:
            limit = f"rollout.graph_limit_mb ({self._limit >> 20})"
            return self._refuse(
                key, function, inputs, f"has one of more shapes than {limit} has room for"
            )
        if captured is None:
            return self._first(key, function, inputs)
        self._graphs.move_to_end(key)
        return self._replay(captured, inputs)

    def _first(self, key: tuple, function: Function, inputs: Inputs) -> tuple:
        try:
            captured = self._capture(function, inputs)
        except CannotCapture as error:
            return self._refuse(key, function, inputs, f"cannot be captured ({error})")
        except Exception as error:
            # RankError, because other ranks may have captured the same forward without a failure.
            raise RankError(
                f"rollout.graphs: the capture of a forward of"
                f" {counted(len(inputs['x']), 'row')} failed"
                f" ({_in_words(error)}). This process cannot use the GPU's memory safely after"
                " that; set rollout.graphs to false, and continue with --resume if there is a"
                " checkpoint"
            ) from error
        self.captures += 1
        outputs = self._replay(captured, inputs)
        if self._verify:
            eager = function(**inputs)
            if not _agree(outputs, eager):
                return self._refuse(key, function, inputs, "gives other values when replayed")
        self._graphs[key] = captured
        # The newest graph stays even if it is above the limit alone.
        while self.nbytes > self._limit and len(self._graphs) > 1:
            gone, _ = self._graphs.popitem(last=False)
            self._left[gone] += 1
        return outputs

    def _replay(self, captured: Captured, inputs: Inputs) -> tuple:
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor)
        captured.replay()
        self.replays += 1
        # Copies, because the next replay overwrites the buffers.
        return tuple(tensor.clone() for tensor in captured.outputs)

    def _refuse(self, key: tuple, function: Function, inputs: Inputs, reason: str) -> tuple:
        # Noted once: every later shape would probably fail for the same reason.
        if not self._refused:
            self._note(
                f"rollout.graphs: a forward of {counted(len(inputs['x']), 'row')} {reason}; such"
                " forwards run eagerly"
            )
        self._refused.add(key)
        return function(**inputs)


def _agree(outputs: tuple[torch.Tensor, ...], eager: tuple[torch.Tensor, ...]) -> bool:
    """Whether a replay equals an eager run up to rounding, since libraries may choose another
    algorithm, with another order of sums, while capturing."""
    # One tolerance for all outputs, that of the coarsest dtype: fp32 latents are computed from a
    # bf16 velocity.
    tolerance = max(TOLERANCE.get(t.dtype, 0.0) for t in eager)
    return all(_close(one, other, tolerance) for one, other in zip(outputs, eager, strict=True))


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    # NaN at the same places is agreement: the model made it, not the capture.
    same_nan = torch.equal(one.isnan(), other.isnan())
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return same_nan and bool((one - other).norm() <= tolerance * other.norm())
