"""FLUX.1-dev with 12 billion random weights: the rollout of one unit, and LoRA updates with one,
two and three states at a time."""

from __future__ import annotations

import time

import torch
from bench import changed, matmul_peak, roll_out_and_score, train
from throughput import forward_flops

from gpu_steps.context import Context, ratio
from gpu_steps.models import RandomEngine
from tempflow.estimate.estimate import estimate

# forwards that a row of an update costs: with the adapters' backward, and of the reference
POLICY, REFERENCE = (2, 1)


def training(context: Context) -> None:
    engine = RandomEngine(context, "flux-dev", None)
    session = engine.session
    flops, peak = forward_flops(session, 0), matmul_peak(session.policy.dtype, context.device)
    rows: list[dict] = []

    def measure(what: str, function, passes: float):
        started = time.perf_counter()
        result, held = context.peak_of(function)
        context.synchronize()
        seconds = time.perf_counter() - started
        forwards = result if isinstance(result, int) else result[0].stats.forwards
        rows.append(
            {
                "what": what,
                "rows": forwards,
                "s": seconds,
                "MFU": flops * passes * forwards / seconds / peak,
                "GB on top": None if held is None else held / 1e9,
            }
        )
        context.note(
            table=rows,
            flops_a_row=flops,
            matmul_flops_per_s=peak,
            weights_bytes=engine.weights,
            headline="; ".join(f"{row['what']} {row['s']:.3g} s, {row['MFU']:.0%}" for row in rows),
        )
        return result

    data, scored = measure(
        "rollout of a unit", lambda: roll_out_and_score(session, engine.order.indices(0), 0), 1
    )
    engine.start_training()
    context.note(trained_bytes=context.allocated())
    passes = (POLICY + REFERENCE) / 2 if session.config.needs_reference() else POLICY
    for size in (1, 2, 3):
        sized = session.variant(changed(session.config, training={"micro_batch": size}))
        measure(
            f"update, micro_batch {size}", lambda sized=sized: train(sized, data, scored), passes
        )
        assert torch.isfinite(
            torch.stack([p.detach().float().norm() for p in session.runtime.trainable.values()])
        ).all()
    context.prove("flux", "rollout", "LoRA", "ZeRO-1")
    _expect(context, engine, rows)


def _expect(context: Context, engine: RandomEngine, rows: list[dict]) -> None:
    """Add the dry run's memory to the row of each update. This comes last, because it takes a CPU
    some seconds for each at full depth."""
    for row, size in zip(rows[1:], (1, 2, 3), strict=True):
        expected = estimate(changed(engine.session.config, training={"micro_batch": size}))
        activations = max(
            item.bytes for item in expected.memory.moments if item.name.startswith("training")
        )
        row |= {"dry run": activations / 1e9, "ratio": ratio(row["GB on top"], activations / 1e9)}
        context.note(table=rows)
