"""Conditionings, and those of many prompts whose shapes may differ: captions have any length,
condition images any size.

Rows share a forward only where their conditionings have one shape. Most families pad theirs to one
length, so all of a run's have the same; a family whose padding would change what it computes is
`ragged`, and whoever batches rows asks `Conditions` which go together.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import torch

Conditioning = dict[str, torch.Tensor]  # prompt embeddings by name, leading dimension = prompts
Shape = Hashable  # of a prompt's conditioning; None for all of a family where they have one shape


def index_rows(conditioning: Conditioning, indices: list[int] | torch.Tensor) -> Conditioning:
    """The conditioning of a batch of rows, by prompt index: a list, or int64 [n] on its device,
    which needs no copy."""
    return {name: tensor[indices] for name, tensor in conditioning.items()}


def shape_of(embeddings: Conditioning) -> Shape:
    """What tells a prompt's embeddings, [...] each, from those that they cannot be stacked with."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(embeddings.items()))


def by_shape(shapes: list[Shape]) -> list[list[int]]:
    """The places of each shape, rising; shapes in order of first appearance."""
    found: dict[Shape, list[int]] = {}
    for place, shape in enumerate(shapes):
        found.setdefault(shape, []).append(place)
    return list(found.values())


@dataclass(frozen=True)
class Conditions:
    """The conditionings of n prompts."""

    shapes: list[Shape]
    """n."""
    stacks: dict[Shape, Conditioning]
    """Those of each shape together, in the order of the prompts."""

    @classmethod
    def equal(cls, stack: Conditioning) -> Conditions:
        """Of a family whose conditionings have one shape."""
        return cls([None] * len(next(iter(stack.values()))), {None: stack})

    @classmethod
    def of(cls, each: list[Conditioning]) -> Conditions:
        """Of prompts encoded one by one, [1, ...] each."""
        shapes, stacks = [shape_of(one) for one in each], {}
        for places in by_shape(shapes):
            first = each[places[0]]
            stacks[shapes[places[0]]] = {
                name: torch.cat([each[n][name] for n in places]) for name in first
            }
        return cls(shapes, stacks)

    @cached_property
    def within(self) -> list[int]:
        """The place of each prompt in the stack of its shape."""
        found = [0] * len(self.shapes)
        for places in by_shape(self.shapes):
            for n, place in enumerate(places):
                found[place] = n
        return found

    def rows(self, places: list[int]) -> Conditioning:
        """The conditioning of a batch of rows of one shape, by the places of their prompts."""
        (shape,) = {self.shapes[place] for place in places}
        return index_rows(self.stacks[shape], [self.within[place] for place in places])
