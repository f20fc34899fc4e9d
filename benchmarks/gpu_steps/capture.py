"""Checks what the engine does with a forward that a CUDA graph cannot record, and what a failed
capture leaves behind in its process.

The second part may make the process unusable, so it comes last, and each finding is written before
the next is made.
"""

from __future__ import annotations

from typing import Callable

import torch

from gpu_steps.context import Context
from gpu_steps.forwards import recomputing


def capture(context: Context) -> None:
    engine = _engine(context)
    if context.rehearse:
        context.note(
            engine=engine,
            torch={"rehearsed": "no capture without a GPU"},
            headline="no capture without a GPU",
        )
        return
    context.note(
        engine=engine, headline=f"the engine: {engine['said'] or 'captured what reads a value'}"
    )
    found: dict = {}
    _spoil(context, found)
    broken = [what for what, how in found["afterwards"].items() if how != "ok"]
    context.note(
        headline=(
            f"the engine: {engine['said']}; after a capture that failed, broken:"
            f" {', '.join(broken) or 'nothing'}"
        )
    )


def _reading(x: torch.Tensor) -> tuple:
    return (x * x.sum().item(),)


def _engine(context: Context) -> dict:
    """Run the engine's graph cache on a function that reads a value. It should run the function
    eagerly, with a reason, and not begin a capture."""
    from tempflow.sampling.graphs import CudaCapture, GraphCache

    said: list[str] = []
    cache = GraphCache(
        recomputing if context.rehearse else CudaCapture(),
        limit_bytes=1 << 30,
        verify=True,
        note=said.append,
    )
    x = torch.ones(4, device=context.device)
    (out,) = cache(_reading, {"x": x})
    if not torch.equal(out, torch.full_like(x, 4.0)):
        raise AssertionError(f"the cache returned {out.tolist()}")
    if context.device.type == "cuda":
        torch.cuda.empty_cache()  # ends in an assertion where a capture began and failed
    return {"said": said[0] if said else None, "captures": cache.captures}


def _spoil(context: Context, found: dict) -> None:
    x, before = torch.ones(1024, device=context.device), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            _reading(x)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    found["stream_restored"] = torch.cuda.current_stream() == before
    torch.cuda.set_stream(before)
    found["afterwards"] = {}
    for what, action in _afterwards(x).items():
        found["afterwards"][what] = "did not return"
        context.note(torch=found)
        found["afterwards"][what] = _tried(action)
        context.note(torch=found)


def _afterwards(x: torch.Tensor) -> dict[str, Callable]:
    def again() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x + 1

    square = x.view(32, 32)
    return {
        "synchronize": torch.cuda.synchronize,
        "a matrix product": lambda: square @ square,
        "empty_cache": torch.cuda.empty_cache,
        "another capture": again,
    }


def _tried(action: Callable) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return "ok"
