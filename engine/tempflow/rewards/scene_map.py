"""Which letters of a text a scene shows, and where: the text aligned with the letters that were
read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tempflow.rewards.letters import weighted
from tempflow.rewards.normal_form import normalize

CELL = 16  # pixels of a map's cells, those of a FLUX token


class Letter(NamedTuple):
    """A character that was read."""

    text: str
    x: float
    """Its center, in pixels from the left."""
    y: float
    """Its center, in pixels from the top."""
    width: float
    """In pixels."""


def scene_map(target: str, read: list[Letter], height: int, width: int) -> np.ndarray:
    """How well each place of a scene shows the letters of a text that belong there, fp32 [rows,
    columns] in [0, 1], of cells of 16 x 16 pixels.

    It is the mean of the letters' scores, weighted by how near each is: 1 for a letter of the
    target that was read in its place in the text, 0 for another one, and for a missing one, at the
    letter beside it. Other text of the scene has no part. 0 everywhere where nothing was read.

    Args:
        target: the text.
        read: the characters that were read, in reading order.
        height: of the image in pixels.
        width: of the image in pixels.
    """
    # In the normal form a character may be several, or none.
    letters = [(c, letter) for letter in read for c in normalize(letter.text)]
    found = align(normalize(target), [c for c, _ in letters])
    rows, columns = max(1, height // CELL), max(1, width // CELL)
    if not found:
        return np.zeros((rows, columns), dtype=np.float32)
    scores = np.array([float(same) for same, _ in found])
    there = [letters[place][1] for _, place in found]
    y, x = (np.arange(rows) + 0.5) * height / rows, (np.arange(columns) + 0.5) * width / columns
    apart = (y[:, None, None] - [one.y for one in there]) ** 2 + (
        x[None, :, None] - [one.x for one in there]
    ) ** 2
    return weighted(scores, apart / np.mean([one.width for one in there]) ** 2)


def spread(text: str, box: np.ndarray) -> list[Letter]:
    """The characters of a line, evenly along its box [4 corners, 2 (x, y)] in pixels, which begins
    at the top left and goes on clockwise."""
    # Not the package's own boxes of characters: it leaves out lines that it cannot cut.
    corners = np.asarray(box, dtype=np.float64)
    start, end = (corners[0] + corners[3]) / 2, (corners[1] + corners[2]) / 2
    count = max(len(text), 1)
    width = max(float(np.linalg.norm(end - start)) / count, 1.0)
    centers = start + (np.arange(count)[:, None] + 0.5) / count * (end - start)
    return [Letter(c, float(x), float(y), width) for c, (x, y) in zip(text, centers)]


def align(target: str, read: list[str]) -> list[tuple[bool, int]]:
    """The letters of a target in the part of what was read that is nearest to it in edit distance.

    Returns:
        For each letter of the target whether it was read in its place, and the place in `read` of
        the letter in its place, or beside it if it is missing. Empty if no letter is in its place.
    """
    # cost[i][j]: of the first i letters of the target and a part of what was read that ends at j.
    # Text before the part is free, and so is text after it.
    cost = [[0] * (len(read) + 1)]
    for i, letter in enumerate(target, 1):
        row, above = [i], cost[-1]
        for j, other in enumerate(read):
            row.append(min(above[j] + (letter != other), above[j + 1] + 1, row[j] + 1))
        cost.append(row)
    # Of equally near parts the one that ends last, so that a wrong last letter is found in its
    # place and does not count as missing.
    i, j = len(target), max(range(len(read) + 1), key=lambda end: (-cost[-1][end], end))
    found: list[tuple[bool, int]] = []
    while i:
        same = j > 0 and target[i - 1] == read[j - 1]
        if j and cost[i][j] == cost[i - 1][j - 1] + (not same):
            i, j = i - 1, j - 1
            found.append((same, j))
        elif cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            found.append((False, max(j - 1, 0)))
        else:
            j -= 1
    return found[::-1] if any(same for same, _ in found) else []
