"""Two layers of every family at their real width: the memory of a rollout, of decoding and of an
update, and how often the host waits for the card, compared with the dry run and the simulated GPU.
"""

from __future__ import annotations

import gc
import warnings
from contextlib import contextmanager
from typing import Iterator

import torch
from bench import roll_out_and_score, train

from gpu_steps.context import Context, ratio
from gpu_steps.models import CONFIGS, RandomEngine
from tempflow.estimate.estimate import Estimate, estimate

# model cards, and the families' names in tests/engine/family_cases.py and hardware.json
NAMES = {
    "flux-dev": "flux",
    "sd35-medium": "sd3",
    "qwen-image": "qwen_image",
    "flux2-klein-base-4b": "flux2",
    "z-image": "z_image",
    "qwen-image-2.1": "qwen_image_21",
    "wan21-1b": "wan",
}
ALLOWED = 0.1  # by which a peak may differ from the dry run's


def families(context: Context) -> None:
    rows = []
    for card in CONFIGS:
        rows += _family(context, card)
        context.note(table=rows)
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    measured = [row["ratio"] for row in rows if row["ratio"] is not None]
    close = sum(abs(value - 1) <= ALLOWED for value in measured)
    context.note(
        headline=f"{close} of {len(measured)} measured peaks within {ALLOWED:.0%} of the dry run"
    )


def _family(context: Context, card: str) -> list[dict]:
    """The rows of one family: measured and expected GB."""
    engine = RandomEngine(
        context, card, 2, "rollout.plan.children=3", "rollout.plan.branch_steps=[0,2]"
    )
    expected = estimate(engine.session.config)
    with host_waits(context) as waits:
        (data, scored), rolled = context.peak_of(
            lambda: roll_out_and_score(engine.session, engine.order.indices(0), 0)
        )
    if not data.stats.forwards or scored.failed:
        raise AssertionError(
            f"{card}: {data.stats.forwards} forwards, {scored.failed} failed images"
        )
    if not all(state.children.isfinite().all() for state in data.kept.states):
        raise AssertionError(f"{card}: latents that are not finite")
    context.prove(NAMES[card], "rollout", "decoding")
    most = max(_moment(expected, "rollout"), _moment(expected, "decoding")) + _item(
        expected, "latents, embeddings"
    )
    rows = [
        _row(card, "weights", engine.weights, _item(expected, "VAE") + _transformer_bytes(engine)),
        _row(card, "rollout and decoding", rolled, most),
    ]
    rows[1]["host waits a forward"] = (
        None if waits is None else round(len(waits) / data.stats.batches, 1)
    )
    engine.start_training()
    _, trained = context.peak_of(lambda: train(engine.session, data, scored))
    context.prove("LoRA", "ZeRO-1")
    return [*rows, _row(card, "an update", trained, _moment(expected, "training"))]


@contextmanager
def host_waits(context: Context) -> Iterator[list | None]:
    """Collects the warnings of operations that make the host wait for the card; None without a
    card."""
    if context.device.type != "cuda":
        yield None
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found: list = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [one for one in seen if "called a synchronizing" in str(one.message)]


def _row(card: str, what: str, measured: int | None, expected: int) -> dict:
    gigabytes = None if measured is None else measured / 1e9
    return {
        "model": card,
        "what": what,
        "GB": gigabytes,
        "dry run": expected / 1e9,
        "ratio": ratio(measured, expected),
    }


def _item(expected: Estimate, name: str) -> int:
    return sum(item.bytes for item in expected.memory.resident if item.name == name)


def _moment(expected: Estimate, start: str) -> int:
    return max(item.bytes for item in expected.memory.moments if item.name.startswith(start))


def _transformer_bytes(engine: RandomEngine) -> int:
    transformer = engine.session.policy.transformer
    return sum(t.nbytes for t in (*transformer.parameters(), *transformer.buffers()))
