"""CUDA graphs of the rollout's forwards: captured once per set of input shapes, replayed from
static buffers.

A replay costs one launch instead of some thousand. It reads the weights where they lay at capture,
so weights must be refreshed in place; `watch` notices when they were not, and drops what was
captured.

A capture that fails cannot be undone in its process. `torch.cuda.graph` then leaves the capture's
stream the current one (2.13), and `CUDAGraph::capture_end` may leave the allocator believing that
the capture goes on (mended in parts in 2.12 and after), so that the next `empty_cache` or capture
ends in an internal assertion. So a capture begins only after a run in which anything that makes the
host wait is an error. What fails there runs eagerly, and says why, once; what fails in the capture
itself ends the run.
"""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterable

import torch

from tempflow.errors import RankError, brief

Inputs = dict[str, torch.Tensor]
Function = Callable[..., tuple]


TURNS = 2  # captures of a shape: more, and capturing takes longer than replays save
# relative, of a replay against an eager run
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class CannotCapture(Exception):
    """A function that would fail in a capture, found before one began."""


@dataclass
class Captured:
    """A captured call. inputs, outputs: its static buffers. replay() reads the ones and writes the
    others. nbytes: device memory that it holds."""

    inputs: Inputs
    outputs: tuple
    replay: Callable[[], None]
    nbytes: int


class CudaCapture:
    """Captures on the current device; all graphs share one memory pool, because only one runs at a
    time.

    Raises CannotCapture before a capture begins, and anything else when one has failed.
    """

    WARM_UP = 2  # eager runs first, so that lazily made workspaces and compiled kernels exist

    def __init__(self):
        self._pool = None

    def __call__(self, function: Function, inputs: Inputs) -> Captured:
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        try:
            self._warm_up(function, static)
        except Exception as error:  # whatever a driver, a kernel or a model refuses with
            raise CannotCapture(_in_words(error)) from error
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        gc.collect()
        # the capture's first act, which would hide what the capture itself reserves
        torch.cuda.empty_cache()
        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        with _stream_kept():
            # "thread_local": NCCL's watchdog asks for events in a thread of its own, which would
            # end a "global" capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = tuple(function(**static))
        held = sum(t.numel() * t.element_size() for t in static.values())
        return Captured(static, outputs, graph.replay, held + torch.cuda.memory_reserved() - before)

    def _warm_up(self, function: Function, static: Inputs) -> None:
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
    """Whatever makes the host wait for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _stream_kept():
    """The current stream is what it was, also where a failed capture leaves its own."""
    before = torch.cuda.current_stream()
    try:
        yield
    except Exception:
        torch.cuda.set_stream(before)
        raise


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {brief(error)}"


class GraphCache:
    """Runs functions of tensors by replaying their captured graphs; `cache(function, inputs)`
    equals `function(**inputs)`.

    Functions are told apart by name and expert (`Denoise.expert`), because each rollout brings its
    own of the same.

    capture(function, inputs) -> Captured; raises CannotCapture for what is to run eagerly.
    limit_bytes: least recently used graphs leave beyond it, and shapes whose graph has left TURNS
    times run eagerly. verify: compare the first replay of each graph with an eager run. note(text)
    is told what is not captured, and why. A call raises UserError where a capture has begun and
    failed.
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
        self._left: Counter[tuple] = Counter()  # how often a graph has gone to make room
        self._weights: tuple[int, ...] = ()
        self.captures = self.replays = 0

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Device memory of all graphs held."""
        return sum(captured.nbytes for captured in self._graphs.values())

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """To be called before a rollout with all weights that it reads: graphs of weights that have
        moved since are dropped."""
        weights = tuple(tensor.data_ptr() for tensor in tensors)
        if self._graphs and weights != self._weights:
            self._note("rollout.graphs: the weights have moved in memory; graphs are captured anew")
            self._graphs.clear()
        self._weights = weights

    @torch.no_grad()
    def __call__(self, function: Function, inputs: Inputs) -> tuple:
        shapes = tuple(
            (name, tensor.shape, tensor.dtype, tensor.device)
            for name, tensor in sorted(inputs.items())
        )
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
                key, function, inputs, f"has one of more shapes than {limit} holds graphs for"
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
            raise RankError(
                f"rollout.graphs: the capture of a forward of {len(inputs['x'])} rows failed"
                f" ({_in_words(error)}). This process cannot use the GPU's memory safely after"
                " that; set rollout.graphs to false, and go on with --resume if there is a"
                " checkpoint"
            ) from error
        self.captures += 1
        outputs = self._replay(captured, inputs)
        if self._verify:
            eager = function(**inputs)
            if not _agree(outputs, eager):
                return self._refuse(key, function, inputs, "gives other values when replayed")
        self._graphs[key] = captured
        while self.nbytes > self._limit and len(self._graphs) > 1:
            gone, _ = self._graphs.popitem(last=False)
            self._left[gone] += 1
        return outputs

    def _replay(self, captured: Captured, inputs: Inputs) -> tuple:
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor)
        captured.replay()
        self.replays += 1
        # the next replay writes over them
        return tuple(tensor.clone() for tensor in captured.outputs)

    def _refuse(self, key: tuple, function: Function, inputs: Inputs, reason: str) -> tuple:
        if not self._refused:
            self._note(
                f"rollout.graphs: a forward of {len(inputs['x'])} rows {reason}; such forwards run"
                " eagerly"
            )
        self._refused.add(key)
        return function(**inputs)


def _agree(outputs: tuple[torch.Tensor, ...], eager: tuple[torch.Tensor, ...]) -> bool:
    """Equal but for the order of sums: libraries may choose another algorithm while capturing.

    All to the tolerance of the loosest dtype: an fp32 output is made of the others, too.
    """
    tolerance = max(TOLERANCE.get(t.dtype, 0.0) for t in eager)
    return all(_close(one, other, tolerance) for one, other in zip(outputs, eager, strict=True))


def _close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    same_nan = torch.equal(one.isnan(), other.isnan())
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return same_nan and bool((one - other).norm() <= tolerance * other.norm())
