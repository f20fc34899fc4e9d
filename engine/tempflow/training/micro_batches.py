"""Chooses the micro-batch sizes that a config leaves open, by measuring at the start.

Noise is keyed by sample and a loss is a mean over states, so the sizes only change speed and the
last bits of results. A resumed run keeps the sizes that it began with.
"""

from __future__ import annotations

import time
from typing import Callable

import torch

from tempflow.models import Conditioning
from tempflow.training import distributed
from tempflow.training.session import Session

MOST = 256
BETTER = 0.97  # factor of the time per row; a smaller gain may be noise, or does not pay for memory
TRIES = 2  # doublings in a row without a gain, after which larger sizes are not tried


def choose(session: Session, embedded: list[int], saved: dict | None) -> None:
    """Set `rollout.micro_batch` and `training.micro_batch` where they are null (a collective).

    Args:
        session: the assembled run, whose config is changed.
        embedded: places of training prompts whose embeddings were computed.
        saved: the config in the checkpoint to resume from; None for a new run.
    """
    found = []
    for section, measure in (("rollout", _forwards), ("training", _backwards)):
        own = getattr(session.config, section)
        if own.micro_batch is not None:
            continue
        own.micro_batch = (saved or {}).get(section, {}).get("micro_batch") or _measured(
            session, own, embedded, measure
        )
        found.append(f"{section}.micro_batch {own.micro_batch}")
    if found and not saved:
        session.note(f"measured: {', '.join(found)}")


def _measured(
    session: Session, section, embedded: list[int], measure: Callable[[Session, list[int]], None]
) -> int:
    # Only a copy can be measured: a forward of the engine is a collective under ZeRO-3, and its
    # backward would leave gradients. Without a copy the default size is used.
    if not session.config.rollout.replica:
        return section.rows if hasattr(section, "rows") else section.states
    prompts = [embedded[i % len(embedded)] for i in range(MOST)]
    return fastest(
        lambda rows: _seconds(lambda: measure(session, prompts[:rows]), session.policy.device), MOST
    )


def fastest(seconds: Callable[[int], float | None], most: int) -> int:
    """The smallest power of two up to `most` whose time per row is within 3 % of the best.

    Args:
        seconds: the time of a pass over a number of rows; None if they do not fit into memory.
        most: largest number of rows.
    """
    each: dict[int, float] = {}
    rows, without_gain = 1, 0
    while rows <= most and without_gain < TRIES:
        taken = seconds(rows)
        if taken is None:
            break
        without_gain = (
            without_gain + 1 if each and taken / rows > BETTER * min(each.values()) else 0
        )
        each[rows] = taken / rows
        rows *= 2
    # The smallest size that is nearly as fast: it leaves the most memory. 1 if nothing fitted.
    best = min(each.values(), default=0.0)
    return next((rows for rows, one in each.items() if BETTER * one <= best), 1)


def _seconds(measure: Callable[[], None], device: torch.device) -> float | None:
    """The faster of two passes after a first one that warms up, on the slowest rank; None if any
    rank runs out of memory (a collective)."""
    times = []
    for _ in range(3):
        started, full = time.perf_counter(), False
        try:
            measure()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            full = True
        # All ranks leave together, or those that had room would wait in the next reduction.
        times.append(time.perf_counter() - started)
        if distributed.reduce(full, "max"):
            return None
    return float(distributed.reduce(min(times[1:]), "max"))


@torch.no_grad()
def _forwards(session: Session, prompts: list[int]) -> None:
    _velocity(session, prompts)


def _backwards(session: Session, prompts: list[int]) -> None:
    """Forward and backward to the latents, through the rollout copy."""
    # The copy's weights are frozen, so only the latents have gradients and none is left behind.
    _velocity(session, prompts, grad=True).float().square().mean().backward()


def _velocity(session: Session, prompts: list[int], grad: bool = False) -> torch.Tensor:
    device = session.policy.device
    x = torch.zeros(len(prompts), *session.sampler.latent_shape, device=device, requires_grad=grad)
    sigma = torch.full((len(prompts),), 0.5, device=device)
    return session.sampler.velocity(
        session.policy.denoiser(), x, sigma, _conditioning(session, prompts)
    )


def _conditioning(session: Session, prompts: list[int]) -> Conditioning:
    """The conditioning of the prompts, or one of the longest shape for families whose shapes
    differ."""
    # The size must fit for any prompt, so the longest one decides.
    if not session.policy.ragged:
        return session.embed_prompts(prompts)
    return {
        name: torch.ones_like(tensor)
        for name, tensor in session.policy.empty_conditioning(len(prompts)).items()
    }
