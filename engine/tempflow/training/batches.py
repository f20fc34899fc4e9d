"""From decisions to micro-batches of the loss: what is weighed, what is skipped, how sums become means.

The loss is the mean over all decisions of all ranks of DESIGN section 2's group loss. Decisions that teach nothing are not
forwarded but counted in that mean, and ranks run equal numbers of micro-batches, so neither the micro-batch size, nor the
number of ranks, nor skipping changes the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from tempflow.advantages import Advantages
from tempflow.sampling.plans import Unit
from tempflow.sampling.scheduler import Decision
from tempflow.sampling.steps import Coefficients


@dataclass
class Batch:
    """Up to `training.micro_batch` decisions, stacked. N decisions of B children.

    x: fp32 [N, ...]; x_next: [N, B, ...]; sigma, a, b, tau, weight: fp32 [N]; advantage, log_prob_rollout: fp32 [N, B];
    units: N. Filled by the first update: log_prob_old [N, B], velocity_old [N, ...] (guard), velocity_ref [N, ...] (KL).
    """

    units: list[Unit]
    x: torch.Tensor
    x_next: torch.Tensor
    sigma: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    tau: torch.Tensor
    weight: torch.Tensor
    advantage: torch.Tensor
    log_prob_rollout: torch.Tensor
    log_prob_old: torch.Tensor | None = None
    velocity_old: torch.Tensor | None = None
    velocity_ref: torch.Tensor | None = None
    real: int = field(default=0)  # decisions that are no padding


def select(decisions: list[Decision], advantages: Advantages, steps: list[int], keep_all: bool):
    """Decisions worth a forward, each with its advantages [B] and its masks [B]; what they hold is finite.

    keep_all (a KL term): every decision with a valid child counts. Otherwise those with an advantage other than 0.
    """
    chosen = []
    for decision in decisions:
        place = decision.unit.prompt, decision.unit.seed, steps.index(decision.step)
        advantage = torch.from_numpy(advantages.values[place])
        valid = torch.from_numpy(advantages.valid[place])
        if advantage.any() or keep_all and valid.any():
            chosen.append((_finite(decision, valid), advantage, valid))
    return chosen


def _finite(decision: Decision, valid: torch.Tensor) -> Decision:
    """With a valid child in the place of failed ones that hold NaN or infinity, which would survive a weight of 0 in the loss."""
    broken = ~valid & ~decision.x_next.isfinite().flatten(1).all(1).cpu()
    if not broken.any():
        return decision
    kept = torch.where(broken, valid.int().argmax(), torch.arange(len(valid)))
    return replace(decision, x_next=decision.x_next[kept], log_prob=decision.log_prob[kept])


def padding_of(decisions: list[Decision]) -> Decision:
    """A decision for places of weight 0: of this rank, and finite."""
    whole = next((d for d in decisions if d.x.isfinite().all() and d.x_next.isfinite().all()), None)
    one = decisions[0]
    return whole or replace(one, x=torch.zeros_like(one.x), x_next=torch.zeros_like(one.x_next), log_prob=torch.zeros_like(one.log_prob))


def make_batches(
    chosen, fallback: Decision, count: int, size: int, sigmas: torch.Tensor, sde: Coefficients,
    step_weight: torch.Tensor, device: torch.device | str,
) -> list[Batch]:  # fmt: skip
    """`count` micro-batches of `size` decisions; places left over repeat `fallback` with weight 0."""
    width = len(fallback.log_prob)
    padding = (fallback, torch.zeros(width), torch.ones(width, dtype=torch.bool))
    padded = chosen + [padding] * (count * size - len(chosen))
    weights = torch.zeros(len(padded))
    for i, (decision, _, valid) in enumerate(chosen):
        # The kernel divides by B; a group with masked children is a mean over the others.
        weights[i] = step_weight[decision.step] * width / valid.sum()
    batches = []
    for first in range(0, len(padded), size):
        part = slice(first, first + size)
        real = max(0, min(len(chosen) - first, size))
        batches.append(_stack(padded[part], weights[part], real, sigmas, sde, device))
    return batches


def _stack(items, weight, real, sigmas, sde, device) -> Batch:
    decisions = [item[0] for item in items]
    steps = [decision.step for decision in decisions]
    return Batch(
        units=[decision.unit for decision in decisions],
        x=torch.stack([d.x for d in decisions]).to(device),
        x_next=torch.stack([d.x_next for d in decisions]).to(device),
        sigma=sigmas[steps].to(device), a=sde.a[steps].to(device), b=sde.b[steps].to(device),
        tau=sde.tau[steps].to(device), weight=weight.to(device),
        advantage=torch.stack([item[1] for item in items]).to(device),
        log_prob_rollout=torch.stack([d.log_prob for d in decisions]).to(device), real=real,
    )  # fmt: skip


def one_child_per_state(batch: Batch) -> Batch:
    """The same loss with every child as a decision of its own: B forwards a state, as the paper's code runs it."""
    width = batch.advantage.shape[1]

    def repeat(t):
        return None if t is None else t.repeat_interleave(width, 0)

    def split(t):
        return None if t is None else t.flatten(0, 1).unsqueeze(1)

    return Batch(
        units=[unit for unit in batch.units for _ in range(width)],
        x=repeat(batch.x), x_next=split(batch.x_next), sigma=repeat(batch.sigma), a=repeat(batch.a),
        b=repeat(batch.b), tau=repeat(batch.tau), weight=repeat(batch.weight), advantage=split(batch.advantage),
        log_prob_rollout=split(batch.log_prob_rollout), log_prob_old=split(batch.log_prob_old),
        velocity_old=repeat(batch.velocity_old), velocity_ref=repeat(batch.velocity_ref), real=batch.real * width,
    )  # fmt: skip
