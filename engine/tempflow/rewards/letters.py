"""Which letters of a text a line of it shows, and where: the most likely alignment of the text with
a CTC recognizer's positions."""

from __future__ import annotations

import numpy as np

SMALLEST = 1e-6  # a probability of 0 would have no logarithm
REACH = 0.3  # standard deviation of the weight of a letter, in distances between letters


def letter_map(blank: np.ndarray, letters: np.ndarray, text: str) -> np.ndarray:
    """How well each position of a line shows the letters of a text that belong there, [T] in [0,
    1].

    It is the mean of the letters' scores (`align`), weighted by how near each is to the position.

    Args:
        blank: [T], the probability of CTC's blank at each position.
        letters: [T, L], those of the L letters of the text.
        text: the L letters.
    """
    scores, places = align(blank, letters, text)
    distance = np.ptp(places) / (len(text) - 1) if len(text) > 1 else len(blank)
    apart = (np.arange(len(blank))[:, None] - places[None]) / max(distance, 1.0)
    return weighted(scores, apart**2)


def weighted(scores: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """The means of the letters' scores at places, fp32 [...], weighted by how near they are.

    Args:
        scores: [L].
        apart: [..., L], the squared distances of the places from the letters, in distances between
            letters.
    """
    # The nearest letter weighs 1 before the division, so that far from all of them it counts alone.
    near = np.exp(-(apart - apart.min(-1, keepdims=True)) / (2 * REACH**2))
    return ((near @ scores) / near.sum(-1)).astype(np.float32)


def align(blank: np.ndarray, letters: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Each letter's highest probability, and its position, on the most likely CTC path of a text.

    Args:
        blank: as of `letter_map`.
        letters: as of `letter_map`.
        text: as of `letter_map`.

    Returns:
        Scores in [0, 1] and positions, [L] each. A text with more letters than a path has room for
        scores 0, evenly spread.
    """
    positions, count = letters.shape
    # The states of CTC: a blank before each letter and after the last one.
    chance = np.empty((positions, 2 * count + 1))
    chance[:, 0::2], chance[:, 1::2] = blank[:, None], letters
    step = np.log(np.maximum(chance, SMALLEST))
    # A path may go from a letter to the next one without a blank, unless the two are equal.
    skips = np.zeros(2 * count + 1, dtype=bool)
    skips[3::2] = [one != other for one, other in zip(text[1:], text)]
    # How each state was reached: from itself, from the one before it, or past a blank.
    options, origin = np.full((3, 2 * count + 1), -np.inf), np.zeros(step.shape, dtype=int)
    options[0, :2] = 0.0
    best = options.max(0) + step[0]
    for t in range(1, positions):
        options[0], options[1, 1:], options[2, skips] = best, best[:-1], best[:-2][skips[2:]]
        origin[t] = options.argmax(0)
        best = options.max(0) + step[t]
    state = len(best) - (1 if best[-1] >= best[-2] else 2)
    if best[state] == -np.inf:
        return np.zeros(count), (np.arange(count) + 0.5) * positions / count - 0.5
    scores, places = np.zeros(count), np.zeros(count)
    for t in range(positions - 1, -1, -1):
        letter = state // 2
        if state % 2 and chance[t, state] >= scores[letter]:
            scores[letter], places[letter] = chance[t, state], t
        state -= origin[t, state]
    return scores, places
