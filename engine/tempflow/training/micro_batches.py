"""Micro-batch sizes that a config leaves open, found by measuring at the start.

The noise of a sample has a name and a loss is a mean over states, so sizes change speed and the
last bits alone. A run that is resumed goes on with the sizes that it began with.
"""

from __future__ import annotations

import time
from typing import Callable

import torch

from tempflow.models import Conditioning
from tempflow.training import distributed
from tempflow.training.session import Session

MOST = 256
BETTER = 0.97  # of the time per row: less of a gain is noise, or not worth the memory
TRIES = 2  # doublings in a row without a gain, before larger sizes are given up


def choose(session: Session, embedded: list[int], saved: dict | None) -> None:
    """Fill in `rollout.micro_batch` and `training.micro_batch` where they are null (a collective).

    Args:
        session: where the run is assembled.
        embedded: places of training prompts whose embeddings are there.
        saved: the config that the checkpoint to resume from was written with; None for a new run.
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
    # a forward of the engine is a collective, and its backward leaves gradients
    if not session.config.rollout.replica:
        return section.rows if hasattr(section, "rows") else section.states
    prompts = [embedded[i % len(embedded)] for i in range(MOST)]
    return fastest(
        lambda rows: _seconds(lambda: measure(session, prompts[:rows]), session.policy.device), MOST
    )


def fastest(seconds: Callable[[int], float | None], most: int) -> int:
    """The smallest power of two up to `most` whose time per row is within 3 % of the best.

    seconds: of a pass over so many rows; None where they do not fit.
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
    best = min(each.values(), default=0.0)
    return next((rows for rows, one in each.items() if BETTER * one <= best), 1)


def _seconds(measure: Callable[[], None], device: torch.device) -> float | None:
    """The faster of two passes after one that warms up, on the slowest rank; None where any rank
    runs out of memory."""
    times = []
    for _ in range(3):
        started, full = time.perf_counter(), False
        try:
            measure()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            full = True
        times.append(time.perf_counter() - started)
        if distributed.reduce(full, "max"):
            return None
    return float(distributed.reduce(min(times[1:]), "max"))


@torch.no_grad()
def _forwards(session: Session, prompts: list[int]) -> None:
    _velocity(session, prompts)


def _backwards(session: Session, prompts: list[int]) -> None:
    """Forward and backward to the latents through the rollout copy: the training engine's gradients
    stay untouched."""
    _velocity(session, prompts, grad=True).float().square().mean().backward()


def _velocity(session: Session, prompts: list[int], grad: bool = False) -> torch.Tensor:
    device = session.policy.device
    x = torch.zeros(len(prompts), *session.sampler.latent_shape, device=device, requires_grad=grad)
    sigma = torch.full((len(prompts),), 0.5, device=device)
    return session.sampler.velocity(
        session.policy.denoiser(), x, sigma, _conditioning(session, prompts)
    )


def _conditioning(session: Session, prompts: list[int]) -> Conditioning:
    """Of the prompts, or where shapes differ of as many of the longest: any prompt must fit."""
    if not session.policy.ragged:
        return session.embed_prompts(prompts)
    return {
        name: torch.ones_like(tensor)
        for name, tensor in session.policy.empty_conditioning(len(prompts)).items()
    }
