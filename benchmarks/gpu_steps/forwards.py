"""One forward of FLUX.1-dev's transformer in every way that the engine has, on the same inputs, and
the decoding of four images."""

from __future__ import annotations

import torch
from bench import matmul_peak
from throughput import forward_flops

from gpu_steps.context import Context
from gpu_steps.models import RandomEngine
from tempflow.media import plain
from tempflow.types import Example

ROWS, IMAGES = 4, 4


def forwards(context: Context) -> None:
    """The step. Later ways need more memory and libraries; findings made before one of them fails
    stay in the report."""
    engine = RandomEngine(context, "flux-dev", None, f"rollout.micro_batch={ROWS}")
    session, policy = engine.session, engine.session.policy
    flops, peak = forward_flops(session, 0), matmul_peak(policy.dtype, context.device)
    x = torch.randn(ROWS, *session.sampler.latent_shape, device=context.device)
    inputs = {
        "x": x,
        "sigma": torch.linspace(0.9, 0.3, ROWS, device=context.device),
        **policy.embed([Example("a")] * ROWS),
    }
    rows, exact = [], None

    def forward_with(transformer):
        def forward(x, sigma, **conditioning):
            return (session.sampler.velocity(transformer, x, sigma, conditioning),)

        return forward

    def measure(way: str, function) -> None:
        nonlocal exact
        (velocity,), held = context.peak_of(lambda: function(**inputs))
        exact = velocity.float() if exact is None else exact
        seconds = context.seconds(lambda: function(**inputs))
        distance = ((velocity.float() - exact).norm() / exact.norm()).item()
        rows.append(
            {
                "forward of 4 rows": way,
                "s": seconds,
                "MFU": flops * ROWS / seconds / peak,
                "GB on top": None if held is None else held / 1e9,
                "relative distance": distance,
            }
        )
        context.note(
            table=rows,
            flops_a_row=flops,
            matmul_flops_per_s=peak,
            weights_bytes=engine.weights,
            headline=_headline(rows),
        )

    with torch.no_grad():
        exactly = forward_with(policy.transformer)
        measure("eager", exactly)
        _decode(context, session.sampler)
        measure("CUDA graph", _graphed(context, exactly))
        coarse = _float8(policy.transformer)
        measure("float8", forward_with(coarse))
        if not context.rehearse:  # a minute of compiling on a CPU, of code that a GPU does not run
            measure("float8, compiled", forward_with(_compiled(coarse)))


def _headline(rows: list[dict]) -> str:
    return "; ".join(
        f"{row['forward of 4 rows']} {row['s']:.3g} s, {row['MFU']:.0%}" for row in rows
    )


def _decode(context: Context, sampler) -> None:
    latents = torch.randn(IMAGES, *sampler.latent_shape, device=context.device)
    (images, _), held = context.peak_of(lambda: sampler.decode(latents))
    assert images.shape == plain(IMAGES, sampler.size, 0).shape
    seconds = context.seconds(lambda: sampler.decode(latents), repeats=1)
    context.note(decode={"images": IMAGES, "seconds": seconds, "bytes": held})
    context.prove("decoding")


def _graphed(context: Context, function):
    """The function through the engine's graph cache. In a rehearsal a stand-in computes again
    instead of replaying."""
    from tempflow.sampling.graphs import CudaCapture, GraphCache

    notes: list[str] = []
    cache = GraphCache(
        recomputing if context.rehearse else CudaCapture(),
        limit_bytes=8 << 30,
        verify=True,
        note=notes.append,
    )

    def run(**inputs):
        out = cache(function, inputs)
        context.note(
            graphs={
                "captures": cache.captures,
                "replays": cache.replays,
                "bytes": cache.nbytes,
                "notes": notes,
                "stand-in": context.rehearse,
            }
        )
        if notes:
            raise AssertionError(f"not replayed: {notes[0]}")
        return out

    return run


def recomputing(function, inputs):
    """A stand-in for a capture on a machine without graphs: its replay calls the function."""
    from tempflow.sampling.graphs import Captured

    static = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = tuple(function(**static))

    def replay() -> None:
        for out, new in zip(outputs, function(**static), strict=True):
            out.copy_(new)

    return Captured(static, outputs, replay, 0)


def _float8(transformer):
    from tempflow.sampling.float8 import Float8Copy

    made = Float8Copy(transformer)
    made.refresh()
    return made.transformer


def _compiled(transformer):
    from tempflow.training.engine import compile_blocks

    compile_blocks(transformer, "compile")
    return transformer
