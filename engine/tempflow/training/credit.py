"""From a rollout's rewards to the micro-batches of the updates, and the metrics of both."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from tempflow.advantages import rank_correlation
from tempflow.sampling.weights import step_weights
from tempflow.training import distributed
from tempflow.training.batches import make_batches, padding_of, select
from tempflow.training.rollout import RolledOut, Scored
from tempflow.training.session import Session
from tempflow.training.update import Part
from tempflow.types import Advantages, State


def make_parts(
    session: Session, rolled: RolledOut, credit: Advantages, steps: list[int] | None = None
) -> list[Part]:
    """This rank's micro-batches of every optimizer step of a pass (a collective).

    Args:
        session: the run.
        rolled: the rollout that is trained on.
        credit: its advantages.
        steps: the steps over which loss weights have mean 1; None: those of the rollout.

    Returns:
        The parts that have a state to forward on any rank.
    """
    t, states = session.config.training, session.objective.states(rolled.kept, credit)
    weights = loss_weights(session, rolled, steps)
    fallback = padding_of(states or [session.objective.filler(rolled.kept)])
    parts = []
    for mine in shares(states, t.updates.parts):
        chosen = select(mine, credit, session.penalty)
        shapes = session.shapes([one.state for one in chosen]) if session.policy.ragged else None
        batches = make_batches(chosen, fallback, t.states, weights, session.policy.device, shapes)
        # All states of all ranks, skipped ones included: the loss is a mean over them.
        total = int(distributed.reduce(len(mine)))
        # Empty on one rank only if it is on all: see `make_batches`.
        if batches:
            parts.append(Part.of(batches, total))
    return parts


def shares(states: list[State], parts: int) -> list[list[State]]:
    """A rank's states of each part. Those of a unit do not depend on the number of ranks.

    The states of a unit go to the parts in turn, beginning with part (prompt + seed) % parts. So
    every part has states of all units, prompts and steps, and every rank has work in every part.
    """
    # Not whole units to a part: all units of one rank could then fall into the same part, and the
    # other ranks would wait in every step (4 seeds on 8 ranks did).
    found: list[list[State]] = [[] for _ in range(parts)]
    places: defaultdict[int, int] = defaultdict(int)
    for state in states:
        unit = state.unit
        found[(unit.prompt + unit.seed + places[unit.index]) % parts].append(state)
        places[unit.index] += 1
    return found


def loss_weights(
    session: Session, rolled: RolledOut, steps: list[int] | None = None
) -> torch.Tensor:
    """Loss weight of every step of the grid, fp32 [T]. steps: as in `make_parts`."""
    grid = rolled.kept.grid
    # States made of endpoints took no step of the SDE, which the weights are derived from.
    if session.objective.wants == "endpoints":
        return torch.ones_like(grid.sde.tau)
    steps = steps or rolled.layout.slots.steps()
    return step_weights(
        grid, steps, ratio=session.objective.ratio, **session.config.training.profile()
    )


def reward_metrics(scored: Scored, credit: Advantages, rolled: RolledOut) -> dict:
    """Metrics of rewards, advantages and the work of the rollout (a collective)."""
    total = scored.rewards.total
    valid = total[np.isfinite(total)]
    # Slots of endpoints have step -1, which is no step of the grid.
    spread = {f"reward_std/step_{k}": float(s) for k, s in credit.spread.items() if k >= 0}
    stats = rolled.stats
    forwards, batches, padded = distributed.reduce([stats.forwards, stats.batches, stats.padded])
    return {
        "reward/mean": float(valid.mean()),
        "reward/std": float(valid.std()),
        "reward/trunk": scored.trunk,
        **_alone(scored.rewards.parts),
        **scored.diversity,
        "reward/zero_std_groups": float(credit.zero_spread.mean()),
        "reward/failed": scored.failed,
        "advantage/mean_abs": float(np.abs(credit.values).mean()),
        "images": scored.images,
        "forwards/rollout": int(forwards),
        "rollout/rows_per_forward": forwards / max(batches, 1),
        "rollout/peak_latents": stats.peak_latents,
        "rollout/padded_rows": int(padded),
        **spread,
    }


def suffix_metrics(
    session: Session, scored: Scored, credit: Advantages, rolled: RolledOut, exact: Scored | None
) -> dict:
    """Rank correlations of rewards and advantages after the run's suffix with those after the exact
    one; nothing if `exact` is None, which no audit was made for."""
    if exact is None:
        return {}
    best = session.advantage(rolled.layout.slots, exact.rewards)
    both = credit.valid & best.valid
    return {
        "suffix/reward_rank_correlation": rank_correlation(
            scored.rewards.total[both], exact.rewards.total[both]
        ),
        "suffix/advantage_rank_correlation": rank_correlation(
            credit.values[both], best.values[both]
        ),
    }


def update_metrics(updates: list[dict], forwards: int, lr: float) -> dict:
    """Metrics of the optimizer steps of an iteration.

    Args:
        updates: metrics of each step, from `Updater.update`.
        forwards: rows forwarded besides those of the steps, on all ranks.
        lr: the learning rate of the last step.
    """
    # The rewards of every group were equal: there is no gradient, and the weights do not change.
    if not updates:
        return {
            "loss": 0.0,
            "kl": 0.0,
            "ratio/max_dev": 0.0,
            "clip_fraction": 0.0,
            "clip_fraction/high": 0.0,
            "clip_fraction/low": 0.0,
            "grad_norm": 0.0,
            "forwards/train": 0,
            "lr": lr,
        }
    # The loss is of the first update, before the weights moved; ratios, clipping and the KL are of
    # the last one, where they are largest.
    first, last = updates[0], updates[-1]
    compared = (
        {"mismatch/log_prob": first["mismatch/log_prob"]} if "mismatch/log_prob" in first else {}
    )
    return {
        "updates/skipped": sum(u["skipped"] for u in updates),
        "loss": first["loss"],
        "kl": last["kl"],
        "clip_fraction": last["clip_fraction"],
        "clip_fraction/high": last["clip_fraction/high"],
        "clip_fraction/low": last["clip_fraction/low"],
        "ratio/max_dev": last["ratio/max_dev"],
        "ratio/min": last["ratio/min"],
        "ratio/max": last["ratio/max"],
        **compared,
        "grad_norm": float(
            np.mean([u["grad_norm"] for u in updates if not u["skipped"]] or [np.nan])
        ),
        "lr": lr,
        "forwards/train": sum(u["forwards"] for u in updates) + forwards,
    }


def _alone(parts: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean and standard deviation of each reward, unweighted, over the images that it scored."""
    found: dict[str, float] = {}
    for name, values in parts.items():
        scored = values[np.isfinite(values)]
        found |= (
            {f"reward/{name}": float(scored.mean()), f"reward/{name}/std": float(scored.std())}
            if len(scored)
            else {}
        )
    return found
