"""Where a line of text shows which letter: against all paths of CTC, and by hand."""

import itertools

import numpy as np
import pytest

from tempflow.rewards.letters import align, letter_map


def collapsed(path):
    """The letters that a path of states stands for: -1 is a blank, repeats count once."""
    kept = [state for state, _ in itertools.groupby(path) if state >= 0]
    return "".join("ab"[state] for state in kept)


def best_path(blank, chances, text):
    """The most likely path of symbols that stands for the text; chances: [T, 2] of "a" and "b"."""
    table = np.concatenate([chances, blank[:, None]], axis=1)  # index -1 is the blank
    paths = [
        path for path in itertools.product((-1, 0, 1), repeat=len(blank)) if collapsed(path) == text
    ]
    return max(
        paths, key=lambda path: np.prod([table[t, s] for t, s in enumerate(path)]), default=()
    )


@pytest.mark.parametrize("text", ["a", "ab", "aab", "abab", "bb"])
def test_the_path_is_the_most_likely_one(text):
    rng = np.random.default_rng(len(text))
    for _ in range(5):
        blank, chances = rng.random(5), rng.random((5, 2))
        letters = chances[:, ["ab".index(letter) for letter in text]]
        scores, places = align(blank, letters, text)
        path = best_path(blank, chances, text)
        # The runs of equal letters on the path, in order, are the letters of the text.
        runs, start = [], 0
        for state, run in itertools.groupby(path):
            steps = range(start, start + len(list(run)))
            start += len(steps)
            if state >= 0:
                runs.append([(chances[t, state], t) for t in steps])
        assert [max(run) for run in runs] == list(zip(scores, places))


def test_a_text_too_long_for_the_line_scores_0():
    scores, places = align(np.full(4, 0.5), np.full((4, 3), 0.5), "aab")  # a blank between the two
    assert scores.tolist() == [0.5] * 3
    scores, places = align(np.full(3, 0.5), np.full((3, 3), 0.5), "aab")
    assert scores.tolist() == [0.0] * 3 and places.tolist() == [0.0, 1.0, 2.0]
    assert letter_map(np.full(1, 0.5), np.full((1, 2), 0.5), "ab").tolist() == [0.0]


def test_a_map_is_the_mean_of_the_letters_nearby():
    blank, letters = np.full(10, 0.9), np.full((10, 2), 1e-4)
    letters[2, 0], letters[7, 1] = 0.8, 0.2
    found = letter_map(blank, letters, "ab")
    # The standard deviation is 0.6 * 5 = 3 positions.
    one, other = (np.exp(-0.5 * (np.arange(10) - place) ** 2 / 9) for place in (2, 7))
    np.testing.assert_allclose(found, (0.8 * one + 0.2 * other) / (one + other), rtol=1e-5)
    assert found.dtype == np.float32


def test_far_from_all_letters_the_nearest_counts():
    letters = np.full((400, 60), 1e-4)
    letters[np.arange(60), np.arange(60)] = 0.7
    found = letter_map(np.full(400, 0.9), letters, "ab" * 30)
    assert np.isfinite(found).all() and abs(found[-1] - 0.7) < 1e-6
