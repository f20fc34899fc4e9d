"""From states to micro-batches of the loss: what is weighed, what is skipped, how sums become
means.

The loss is a mean over the states of all ranks. States whose advantages are all zero are not
forwarded but counted in that mean, and ranks run equal numbers of micro-batches, so neither the
micro-batch size, nor the number of ranks, nor skipping changes the gradient. A micro-batch holds
states whose prompts' conditionings have one shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tempflow.models import Shape, by_shape
from tempflow.objectives import Batch
from tempflow.penalties import Penalty
from tempflow.training import distributed
from tempflow.transfer import send
from tempflow.types import Advantages, State


@dataclass(frozen=True)
class Weighed:
    """A state that is forwarded."""

    state: State
    advantage: torch.Tensor
    """fp32 [B]."""
    valid: torch.Tensor
    """bool [B]: children whose reward is known."""


def select(states: list[State], advantages: Advantages, penalty: Penalty | None) -> list[Weighed]:
    """States worth a forward; what they hold is finite.

    Those with an advantage other than 0, and, where a penalty acts on their step, all others with a
    valid child.
    """
    chosen = []
    for state in states:
        advantage = torch.from_numpy(advantages.values[state.slots])
        valid = torch.from_numpy(advantages.valid[state.slots])
        if advantage.any() or penalty is not None and penalty.acts_on(state.step) and valid.any():
            chosen.append(Weighed(_finite(state, valid), advantage, valid))
    return chosen


def _finite(state: State, valid: torch.Tensor) -> State:
    """With a valid child in the place of failed ones that hold NaN or infinity, which would survive
    a weight of 0 in the loss."""
    if valid.all():  # without a look at the children, which would wait for the GPU
        return state
    broken = ~valid & ~state.children.isfinite().flatten(1).all(1).cpu()
    if not broken.any():
        return state
    kept = torch.where(broken, valid.int().argmax(), torch.arange(len(valid)))
    return replace(
        state,
        children=state.children[kept],
        log_prob=None if state.log_prob is None else state.log_prob[kept],
    )


def padding_of(states: list[State]) -> State:
    """A state for places of weight 0: of this rank, and finite."""
    whole = next((s for s in states if s.x.isfinite().all() and s.children.isfinite().all()), None)
    one = states[0]
    log_prob = None if one.log_prob is None else torch.zeros_like(one.log_prob)
    return whole or replace(
        one, x=torch.zeros_like(one.x), children=torch.zeros_like(one.children), log_prob=log_prob
    )


def make_batches(
    chosen: list[Weighed],
    fallback: State,
    micro_batch: int,
    step_weight: torch.Tensor,
    device: torch.device | str,
    shapes: list[Shape] | None = None,
) -> list[Batch]:
    """This rank's micro-batches, as many as any rank needs (a collective).

    Args:
        chosen: the states of this rank.
        fallback: repeated with weight 0 in places left over.
        micro_batch: most states in one.
        step_weight: fp32 [T], the loss weight of every step of the grid.
        device: where the batches are put.
        shapes: of the conditioning of each chosen state's prompt, where the family's differ; None:
            all have one.
    """
    parts = _even(len(chosen), micro_batch) if shapes is None else _ragged(shapes, micro_batch)
    width = max([len(one.valid) for one in chosen] or [len(fallback.slots)])
    filler = _filler(fallback, width)
    batches = []
    for members, size in parts:
        real = [chosen[n] for n in members]
        places = [_widened(one, width) for one in real + [filler] * (size - len(real))]
        weights = torch.zeros(size)
        for i, one in enumerate(places[: len(real)]):
            # The kernel divides by B; a group with masked children is a mean over the others.
            weights[i] = step_weight[one.state.step] * width / one.valid.sum()
        batches.append(_stack(places, weights, len(real), device))
    return batches


# the places of a micro-batch's states, and its size, which may be larger
_Places = tuple[list[int], int]


def _even(chosen: int, micro_batch: int) -> list[_Places]:
    """Micro-batches of one size, on every rank (a collective): the least padding."""
    most = int(distributed.reduce(chosen, "max"))
    if most == 0:
        return []
    count = math.ceil(most / micro_batch)
    size = math.ceil(most / count)
    return [
        (list(range(first, min(first + size, chosen))), size)
        for first in range(0, count * size, size)
    ]


def _ragged(shapes: list[Shape], micro_batch: int) -> list[_Places]:
    """Micro-batches of one shape each, as many on every rank (a collective). A rank that needs
    fewer than another halves its largest ones, and where all have one state, adds some of padding
    alone."""
    parts = [
        part
        for places in by_shape(shapes)
        for part in _cut(places, math.ceil(len(places) / micro_batch))
    ]
    missing = int(distributed.reduce(len(parts), "max")) - len(parts)
    for _ in range(missing):
        largest = max(range(len(parts)), key=lambda n: len(parts[n]), default=None)
        if largest is None or len(parts[largest]) < 2:
            parts.append([])
        else:
            parts[largest : largest + 1] = _cut(parts[largest], 2)
    return [(part, max(len(part), 1)) for part in parts]


def _cut(places: list[int], count: int) -> list[list[int]]:
    """In `count` parts whose lengths differ by 1 at most."""
    bounds = [n * len(places) // count for n in range(count + 1)]
    return [places[first:last] for first, last in zip(bounds, bounds[1:])]


def _filler(state: State, width: int) -> Weighed:
    """Of no more than `width` children: the padding may be wider than every state that is trained
    on."""
    log_prob = None if state.log_prob is None else state.log_prob[:width]
    state = replace(
        state, children=state.children[:width], slots=state.slots[:width], log_prob=log_prob
    )
    return Weighed(
        state, torch.zeros(len(state.slots)), torch.ones(len(state.slots), dtype=torch.bool)
    )


def _widened(one: Weighed, width: int) -> Weighed:
    """With masked copies of its first valid child, up to `width` children: a micro-batch has as
    many for every state."""
    missing = width - len(one.valid)
    if not missing:
        return one
    first = int(one.valid.int().argmax())
    again = torch.tensor([*range(len(one.valid)), *[first] * missing])
    masked = torch.arange(width) >= len(one.valid)
    log_prob = one.state.log_prob
    state = replace(
        one.state,
        children=_filled(one.state.children, first, missing),
        log_prob=None if log_prob is None else _filled(log_prob, first, missing),
    )
    return Weighed(state, one.advantage[again].masked_fill(masked, 0.0), one.valid[again] & ~masked)


def _filled(rows: torch.Tensor, place: int, missing: int) -> torch.Tensor:
    """With as many copies of a row behind them; an index of the CPU's would be copied to the
    GPU."""
    return torch.cat([rows, rows[place].expand(missing, *rows.shape[1:])])


def _stack(places: list[Weighed], weight: torch.Tensor, real: int, device) -> Batch:
    states = [one.state for one in places]
    numbers = {
        "weight": weight,
        "advantage": torch.stack([one.advantage for one in places]),
        "valid": torch.stack([one.valid for one in places]),
        **{
            name: torch.tensor([getattr(s, name) for s in states])
            for name in ("sigma", "a", "b", "tau", "step")
        },
    }
    scored = all(s.log_prob is not None for s in states)
    return Batch(
        units=[s.unit for s in states],
        x=torch.stack([s.x for s in states]).to(device),
        children=torch.stack([s.children for s in states]).to(device),
        log_prob_rollout=torch.stack([s.log_prob for s in states]).to(device) if scored else None,  # type: ignore[misc]  # `scored`: every state has one
        real=real,
        **send([numbers], device)[0],
    )
