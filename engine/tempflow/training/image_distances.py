"""Distances between the images of a rollout, and their colors, from their thumbnails. Some
advantages use them, and so do the metrics of diversity."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from tempflow.run.diversity import distance_to_others, mean_colors, mean_distance
from tempflow.sampling.layout import Layout
from tempflow.training import distributed
from tempflow.training.session import Session

if TYPE_CHECKING:  # rollout imports this module
    from tempflow.training.rollout import RolledOut


def novelty(session: Session, rolled: RolledOut) -> np.ndarray | None:
    """Mean distance of each slot's image to the others of its group, float64 [n], if the advantage
    needs it (a collective then)."""
    if not session.advantage.needs_novelty:
        return None
    seen = _by_slot(rolled, np.stack(rolled.images.thumbnails))
    return distance_to_others(seen, rolled.layout.slots.groups(session.advantage.over))


def colors(session: Session, rolled: RolledOut) -> np.ndarray | None:
    """Mean color of each slot's image, float64 [n, 3] in [0, 1], if the advantage needs it (a
    collective then)."""
    if not session.advantage.needs_colors:
        return None
    seen = mean_colors(np.stack(rolled.images.thumbnails), session.sampler.size)
    return _by_slot(rolled, seen)


def _by_slot(rolled: RolledOut, seen: np.ndarray) -> np.ndarray:
    """Values [images, D] of this rank's images as those of the slots of all ranks, float64 [n, D]
    (a collective)."""
    # A group may have images on several ranks: all values are summed into one array.
    whole = np.zeros((len(rolled.layout), seen.shape[1]))
    whole[[rolled.forest.numbers[n] for n in rolled.images.rows]] = seen
    return rolled.layout.slots.means(distributed.reduce(whole).T).T


def diversity(rolled: RolledOut) -> dict[str, float]:
    """Mean distances between a prompt's images of different seeds, and between the children of one
    state (a collective)."""
    # In the order of rows; images arrive in the order of decoding.
    seen = np.stack(rolled.images.thumbnails)[np.argsort(rolled.images.rows)]
    layout, found = rolled.layout, {}
    prompts = 1 + max(unit.prompt for unit in layout.units)
    if len(layout.units) > prompts:  # several seeds per prompt, perhaps on several ranks
        roots = np.zeros((len(layout.units), seen.shape[1]), dtype=np.float32)
        for thumbnail, row in zip(seen, rolled.forest.rows, strict=True):
            if row.parent is None:
                roots[row.unit.index] = thumbnail
        found["diversity/seeds"] = _mean_of_known(
            mean_distance(distributed.reduce(roots.reshape(prompts, -1, seen.shape[1])))
        )
    # The children of a state are all on one rank; the sum over ranks fills in the others' places.
    apart = np.zeros(len(_siblings(layout)))
    if len(apart):
        mine = defaultdict(list)
        for n, row in enumerate(rolled.forest.rows):
            if row.parent is not None:
                mine[rolled.forest.numbers[row.parent], row.start].append(n)
        for place, key in enumerate(_siblings(layout)):
            if key in mine:
                apart[place] = mean_distance(seen[mine[key]])
        found["diversity/children"] = _mean_of_known(distributed.reduce(apart))
    return found


def _siblings(layout: Layout) -> list[tuple[int, int]]:
    """(parent row, step) of every state that at least two rows branch off, ordered by unit and
    step. Rows are numbered over all units."""
    found, first = [], 0
    for rows in layout.rows:
        counts: defaultdict[tuple, int] = defaultdict(int)
        for row in rows:
            if row.parent is not None:
                counts[row.start, first + row.parent] += 1
        found += [(parent, step) for (step, parent), count in sorted(counts.items()) if count > 1]
        first += len(rows)
    return found


def _mean_of_known(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there are none."""
    # A group with fewer than two finite images has no distance.
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
