"""From states to micro-batches of the loss: which states are forwarded, with which weights, and how
they are padded.

The loss is a mean over the states of all ranks. States whose advantages are all zero are not
forwarded, but still count in the mean, and all ranks run equally many micro-batches. So neither the
micro-batch size, nor the number of ranks, nor skipping changes the gradient. All prompts of a
micro-batch have conditionings of one shape.
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
    maps: torch.Tensor | None = None
    """fp32 [B, rows, columns]: an advantage for each place; None: `advantage` holds for all."""


def select(states: list[State], advantages: Advantages, penalty: Penalty | None) -> list[Weighed]:
    """The states to forward: those with an advantage other than 0, and, where a penalty acts on
    their step, all others with a valid child.

    Args:
        states: of this rank.
        advantages: of all slots.
        penalty: the run's penalty, if any.

    Returns:
        The chosen states, in the same order, with children that are finite.
    """
    chosen = []
    for state in states:
        # From numpy, on the CPU: deciding there does not make the host wait for the GPU.
        advantage = torch.from_numpy(advantages.values[state.slots])
        valid = torch.from_numpy(advantages.valid[state.slots])
        maps = None if advantages.maps is None else torch.from_numpy(advantages.maps[state.slots])
        pulls = (advantage if maps is None else maps).any()
        if pulls or penalty is not None and penalty.acts_on(state.step) and valid.any():
            chosen.append(Weighed(_finite(state, valid), advantage, valid, maps))
    return chosen


def _finite(state: State, valid: torch.Tensor) -> State:
    """The state with a valid child in place of each failed child that holds NaN or infinity."""
    # A failed child has advantage 0, but 0 times NaN is NaN in the loss.
    if valid.all():  # looking at the children would make the host wait for the GPU
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
    """A finite state of this rank, for places of weight 0."""
    whole = next((s for s in states if s.x.isfinite().all() and s.children.isfinite().all()), None)
    # If none is finite the run has diverged; zeros keep the padding from adding NaN of its own.
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
    """This rank's micro-batches, as many as the rank that needs most (a collective).

    Args:
        chosen: the states of this rank.
        fallback: a state that is repeated with weight 0 in places left over.
        micro_batch: largest number of states in one.
        step_weight: fp32 [T], the loss weight of every step of the grid.
        device: where the batches are put.
        shapes: the shape of the conditioning of each chosen state's prompt, for families whose
            shapes differ; None: all are the same.
    """
    parts = _even(len(chosen), micro_batch) if shapes is None else _ragged(shapes, micro_batch)
    # States may have different numbers of children; a tensor has one.
    width = max([len(one.valid) for one in chosen] or [len(fallback.slots)])
    filler = _filler(fallback, width, chosen[0].maps if chosen else None)
    batches = []
    for members, size in parts:
        real = [chosen[n] for n in members]
        places = [_widened(one, width) for one in real + [filler] * (size - len(real))]
        weights = torch.zeros(size)
        for i, one in enumerate(places[: len(real)]):
            # The kernel divides by B, masked children included. This factor makes it a mean over
            # the valid ones.
            weights[i] = step_weight[one.state.step] * width / one.valid.sum()
        batches.append(_stack(places, weights, len(real), device))
    return batches


# The places of a micro-batch's states in `chosen`, and its size, which padding may make larger.
_Places = tuple[list[int], int]


def _even(chosen: int, micro_batch: int) -> list[_Places]:
    """Micro-batches of one size, as many on every rank, with as little padding as possible (a
    collective)."""
    # Every rank needs as many: under ZeRO-3 a forward is a collective.
    most = int(distributed.reduce(chosen, "max"))
    if most == 0:
        return []
    count = math.ceil(most / micro_batch)
    # Smaller than micro_batch where that fills them evenly: 50 states by 48 are 2 batches of 25.
    size = math.ceil(most / count)
    return [
        (list(range(first, min(first + size, chosen))), size)
        for first in range(0, count * size, size)
    ]


def _ragged(shapes: list[Shape], micro_batch: int) -> list[_Places]:
    """Micro-batches of one shape each, as many on every rank (a collective)."""
    parts = [
        part
        for places in by_shape(shapes)
        for part in _cut(places, math.ceil(len(places) / micro_batch))
    ]
    missing = int(distributed.reduce(len(parts), "max")) - len(parts)
    # A rank with fewer than another halves its largest one, which costs no padding. When all hold a
    # single state, it adds micro-batches of padding alone.
    for _ in range(missing):
        largest = max(range(len(parts)), key=lambda n: len(parts[n]), default=None)
        if largest is None or len(parts[largest]) < 2:
            parts.append([])
        else:
            parts[largest : largest + 1] = _cut(parts[largest], 2)
    return [(part, max(len(part), 1)) for part in parts]


def _cut(places: list[int], count: int) -> list[list[int]]:
    """`count` consecutive parts whose lengths differ by at most 1."""
    bounds = [n * len(places) // count for n in range(count + 1)]
    return [places[first:last] for first, last in zip(bounds, bounds[1:])]


def _filler(state: State, width: int, maps: torch.Tensor | None) -> Weighed:
    """The padding state with at most `width` children, advantages of 0, and all children valid.
    maps: those of a state beside it, for their size."""
    # It may have more children than any state that is trained on.
    log_prob = None if state.log_prob is None else state.log_prob[:width]
    state = replace(
        state, children=state.children[:width], slots=state.slots[:width], log_prob=log_prob
    )
    children = len(state.slots)
    return Weighed(
        state,
        torch.zeros(children),
        torch.ones(children, dtype=torch.bool),
        None if maps is None else maps.new_zeros(children, *maps.shape[1:]),
    )


def _widened(one: Weighed, width: int) -> Weighed:
    """The state with `width` children: masked copies of its first valid child fill it up."""
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
    maps = None if one.maps is None else one.maps[again] * ~masked[:, None, None]
    return Weighed(
        state, one.advantage[again].masked_fill(masked, 0.0), one.valid[again] & ~masked, maps
    )


def _filled(rows: torch.Tensor, place: int, missing: int) -> torch.Tensor:
    """Rows [n, ...] followed by `missing` copies of the one at `place`."""
    # Not rows[again]: an index on the CPU would be copied to the GPU, and the host would wait.
    return torch.cat([rows, rows[place].expand(missing, *rows.shape[1:])])


def _stack(places: list[Weighed], weight: torch.Tensor, real: int, device) -> Batch:
    states = [one.state for one in places]
    # All small tensors go to the device in one pinned copy, which the host does not wait for.
    numbers = {
        "weight": weight,
        "advantage": torch.stack([one.advantage for one in places]),
        "valid": torch.stack([one.valid for one in places]),
        **{
            name: torch.tensor([getattr(s, name) for s in states])
            for name in ("sigma", "a", "b", "tau", "step")
        },
    }
    maps = [one.maps for one in places if one.maps is not None]
    if maps:
        numbers["maps"] = _over_latents(torch.stack(maps), states[0].x)
    log_probs = [s.log_prob for s in states if s.log_prob is not None]
    scored = len(log_probs) == len(states)
    return Batch(
        units=[s.unit for s in states],
        x=torch.stack([s.x for s in states]).to(device),
        children=torch.stack([s.children for s in states]).to(device),
        log_prob_rollout=torch.stack(log_probs).to(device) if scored else None,
        real=real,
        sigmas=[s.sigma for s in states],
        **send([numbers], device)[0],
    )


def _over_latents(maps: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """Maps [N, B, rows, columns] in the form in which they broadcast over latents [N, B, ...]."""
    # The families have two layouts: packed tokens [S, C], and images or videos [C, ..., H, W].
    if latent.ndim == 2:
        return maps.flatten(2)[..., None]
    return maps.reshape(*maps.shape[:2], *[1] * (latent.ndim - 2), *maps.shape[2:])
