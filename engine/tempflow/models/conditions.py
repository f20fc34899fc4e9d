"""Conditionings of prompts, also of many prompts whose conditionings differ in shape.

Rows share a forward only if their conditionings have the same shape. Most families pad embeddings
to one length, so all rows of a run can share. Captions of any length and condition images of any
size give embeddings of several shapes; where padding would change the result, the family is
`ragged`, and code that forms batches asks `Conditions` which rows may go together.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import torch

# The inputs of the denoiser that depend on the prompt, by name, [prompts or rows, ...] each.
Conditioning = dict[str, torch.Tensor]
# Identifies the shape of a prompt's conditioning; None for every prompt of a family that has one
# shape only.
Shape = Hashable


def index_rows(conditioning: Conditioning, indices: list[int] | torch.Tensor) -> Conditioning:
    """The conditioning of a batch of rows, gathered by prompt.

    Args:
        conditioning: of all prompts, [prompts, ...] each.
        indices: the prompt of each of n rows: a list, or int64 [n] on the device of the
            conditioning, which saves a copy that the host would wait for.

    Returns:
        [n, ...] each.
    """
    return {name: tensor[indices] for name, tensor in conditioning.items()}


def shape_of(embeddings: Conditioning) -> Shape:
    """The `Shape` of one prompt's embeddings. Embeddings can be stacked if theirs are equal."""
    # Sorted, because the order of names depends on whether they were computed or read from a file.
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(embeddings.items()))


def by_shape(shapes: list[Shape]) -> list[list[int]]:
    """Group the places of a list by their shape: rising places within each group, groups in order
    of first appearance. The order is the same on every rank."""
    found: dict[Shape, list[int]] = {}
    for place, shape in enumerate(shapes):
        found.setdefault(shape, []).append(place)
    return list(found.values())


@dataclass(frozen=True)
class Conditions:
    """The conditionings of n prompts."""

    shapes: list[Shape]
    """The shape of each of the n prompts."""
    stacks: dict[Shape, Conditioning]
    """The conditionings of each shape, stacked in the order of the prompts."""

    @classmethod
    def equal(cls, stack: Conditioning) -> Conditions:
        """For a family whose conditionings all have one shape: `stack` holds all prompts."""
        return cls([None] * len(next(iter(stack.values()))), {None: stack})

    @classmethod
    def of(cls, each: list[Conditioning]) -> Conditions:
        """For prompts that were encoded one by one, [1, ...] each."""
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
        """The conditioning of a batch of rows, by the places of their prompts, which must have one
        shape."""
        (shape,) = {self.shapes[place] for place in places}  # fails if there are several
        return index_rows(self.stacks[shape], [self.within[place] for place in places])
