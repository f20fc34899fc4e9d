"""Profiles FLUX.1-dev's forward and a micro-batch with torch.profiler: which kernels take the time,
and whether the host keeps the card busy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Callable

import torch
from bench import changed, roll_out_and_score, train

from gpu_steps.context import Context
from gpu_steps.models import RandomEngine

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
TOP = 12


def trace(context: Context) -> None:
    engine = RandomEngine(
        context,
        "flux-dev",
        None,
        "rollout.plan.branch_steps=[0]",
        "rollout.plan.children=2",
        "rollout.num_steps=2",
    )
    session, rows = engine.session, []

    def profile(what: str, function: Callable) -> None:
        function()
        seen = busy_and_gaps(_events(context, function))
        rows.append({"what": what, **{key: value for key, value in seen.items() if key != "top"}})
        context.note(
            table=rows,
            **{what: seen["top"]},
            headline="; ".join(f"{row['what']}: busy {row['busy']:.1%}" for row in rows),
        )

    def roll_out():
        return roll_out_and_score(session, engine.order.indices(0), 0)

    profile("two forwards and decoding", roll_out)
    rolled, scored = roll_out()
    engine.start_training()
    single = session.variant(changed(session.config, training={"micro_batch": 1}))
    profile("a micro-batch", lambda: train(single, rolled, scored))


def _events(context: Context, function: Callable) -> list[dict]:
    """What a call runs on the card. In a rehearsal: the operators that PyTorch calls on the CPU."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] if context.rehearse else [kinds.CPU, kinds.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        context.synchronize()
    file = Path(context.scratch, "trace.json")
    profiler.export_chrome_trace(str(file))
    wanted = ("cpu_op",) if context.rehearse else ON_DEVICE
    return [
        event for event in json.loads(file.read_text())["traceEvents"] if event.get("cat") in wanted
    ]


def busy_and_gaps(events: list[dict]) -> dict:
    """From the start of the first event to the end of the last: the share of the time in which
    something runs, the gaps between events, and the events that take the most time in total. Times
    are microseconds in a trace, seconds in the result."""
    if not events:
        raise AssertionError("the profiler saw nothing on the device")
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    end, gaps = spans[0][0], []
    for start, stop in spans:
        if start > end:
            gaps.append(start - end)
        end = max(end, stop)
    whole = end - spans[0][0]
    taken: Counter = Counter()
    for event in events:
        taken[event["name"]] += event["dur"]
    top = [{"name": name[:100], "s": total / 1e6} for name, total in taken.most_common(TOP)]
    return {
        "kernels": len(events),
        "s": whole / 1e6,
        "busy": 1 - sum(gaps) / max(whole, 1e-9),
        "gaps over 20 us": sum(gap > 20 for gap in gaps),
        "largest gap, ms": max(gaps, default=0.0) / 1e3,
        "top": top,
    }
