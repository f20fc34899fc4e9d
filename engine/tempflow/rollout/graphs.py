"""CUDA graphs of the rollout's forwards: captured once per set of input shapes, replayed from static buffers.

A replay costs one launch instead of some thousand. It reads the weights where they lay at capture, so weights must be
refreshed in place; `watch` notices when they were not, and drops what was captured. What cannot be captured runs eagerly,
and says why, once.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Callable, Iterable

import torch

Inputs = dict[str, torch.Tensor]
Function = Callable[..., tuple]


@dataclass
class Captured:
    """A captured call. inputs, outputs: its static buffers. replay() reads the ones and writes the others. nbytes: device
    memory that it holds."""

    inputs: Inputs
    outputs: tuple
    replay: Callable[[], None]
    nbytes: int


class CudaCapture:
    """Captures on the current device; all graphs share one memory pool, because only one runs at a time."""

    WARM_UP = 3  # eager runs first, so that lazily made workspaces and compiled kernels exist

    def __init__(self):
        self._pool = None

    def __call__(self, function: Function, inputs: Inputs) -> Captured:
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                function(**static)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = tuple(function(**static))
        held = sum(t.numel() * t.element_size() for t in static.values())
        return Captured(static, outputs, graph.replay, held + torch.cuda.memory_reserved() - before)


class GraphCache:
    """Runs functions of tensors by replaying their captured graphs; `cache(function, inputs)` equals `function(**inputs)`.

    Functions are told apart by name, because each rollout brings its own of the same.

    capture(function, inputs) -> Captured; raises where it cannot. limit_bytes: least recently used graphs leave beyond it.
    verify: compare the first replay of each graph with an eager run. note(text) is told what is not captured, and why.
    """

    def __init__(self, capture: Callable[[Function, Inputs], Captured], *, limit_bytes: int, verify: bool,
                 note: Callable[[str], None]):  # fmt: skip
        self._capture, self._limit, self._verify, self._note = capture, limit_bytes, verify, note
        self._graphs: OrderedDict[tuple, Captured] = OrderedDict()
        self._refused: set[tuple] = set()
        self._weights: tuple[int, ...] = ()
        self.captures = self.replays = 0

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Device memory of all graphs held."""
        return sum(captured.nbytes for captured in self._graphs.values())

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """To be called before a rollout with all weights that it reads: graphs of weights that have moved since are dropped."""
        weights = tuple(tensor.data_ptr() for tensor in tensors)
        if self._graphs and weights != self._weights:
            self._note("rollout.graphs: the weights have moved in memory; graphs are captured anew")
            self._graphs.clear()
        self._weights = weights

    @torch.no_grad()
    def __call__(self, function: Function, inputs: Inputs) -> tuple:
        shapes = tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in sorted(inputs.items()))
        key = function.__qualname__, shapes
        if key in self._refused:
            return function(**inputs)
        captured = self._graphs.get(key)
        if captured is None:
            return self._first(key, function, inputs)
        self._graphs.move_to_end(key)
        return self._replay(captured, inputs)

    def _first(self, key: tuple, function: Function, inputs: Inputs) -> tuple:
        try:
            captured = self._capture(function, inputs)
        except Exception as error:  # whatever a driver, a kernel or a model refuses with
            return self._refuse(key, function, inputs, f"cannot be captured ({type(error).__name__}: {error})")
        self.captures += 1
        outputs = self._replay(captured, inputs)
        if self._verify:
            eager = function(**inputs)
            if not all(_agree(one, other) for one, other in zip(outputs, eager, strict=True)):
                return self._refuse(key, function, inputs, "gives other values when replayed")
        self._graphs[key] = captured
        while self.nbytes > self._limit and len(self._graphs) > 1:
            self._graphs.popitem(last=False)
        return outputs

    def _replay(self, captured: Captured, inputs: Inputs) -> tuple:
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor)
        captured.replay()
        self.replays += 1
        return tuple(tensor.clone() for tensor in captured.outputs)  # the next replay writes over them

    def _refuse(self, key: tuple, function: Function, inputs: Inputs, reason: str) -> tuple:
        if not self._refused:
            self._note(f"rollout.graphs: a forward of {len(inputs['x'])} rows {reason}; such forwards run eagerly")
        self._refused.add(key)
        return function(**inputs)


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the order of sums: libraries may choose another algorithm while capturing."""
    tolerance = 1e-5 if one.dtype == torch.float32 else 2e-2
    same_nan = torch.equal(one.isnan(), other.isnan())
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return same_nan and bool((one - other).norm() <= tolerance * other.norm())
