"""Where an image shows which letter: lines against all paths of CTC, scenes by hand."""

import itertools

import numpy as np
import pytest

from tempflow.rewards import scene_map as scenes
from tempflow.rewards.letters import align, letter_map
from tempflow.rewards.normal_form import edit_distance


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
    # The standard deviation is 0.3 * 5 = 1.5 positions.
    one, other = (np.exp(-0.5 * (np.arange(10) - place) ** 2 / 2.25) for place in (2, 7))
    np.testing.assert_allclose(found, (0.8 * one + 0.2 * other) / (one + other), rtol=1e-5)
    assert found.dtype == np.float32


def test_far_from_all_letters_the_nearest_counts():
    letters = np.full((400, 60), 1e-4)
    letters[np.arange(60), np.arange(60)] = 0.7
    found = letter_map(np.full(400, 0.9), letters, "ab" * 30)
    assert np.isfinite(found).all() and abs(found[-1] - 0.7) < 1e-6


# ------------------------------------------------------------------------------------------- scenes
@pytest.mark.parametrize(
    "target, read, found",
    [
        ("abc", "abc", [(True, 0), (True, 1), (True, 2)]),
        ("abc", "xxabcxx", [(True, 2), (True, 3), (True, 4)]),
        ("abc", "axc", [(True, 0), (False, 1), (True, 2)]),
        ("abc", "ac", [(True, 0), (False, 0), (True, 1)]),
        ("abc", "abxc", [(True, 0), (True, 1), (True, 3)]),
        ("abc", "bc", [(False, 0), (True, 0), (True, 1)]),
        ("abc", "xyz", []),
        ("abc", "", []),
    ],
)
def test_letters_read(target, read, found):
    assert scenes.align(target, list(read)) == found


def test_the_part_that_is_aligned_is_the_nearest():
    rng = np.random.default_rng(0)
    for _ in range(200):
        target, read = ("".join(rng.choice(list("abc"), n)) for n in rng.integers(1, 8, 2))
        parts = [read[i:j] for i in range(len(read)) for j in range(i, len(read) + 1)]
        least = min(edit_distance(target, part) for part in parts)
        found = scenes.align(target, list(read))
        same = [place for right, place in found if right]
        assert same == sorted(set(same)) and all(read[i] in target for i in same)
        assert not found or len(target) - len(same) <= least
        assert found or least == len(target) or not set(target) & set(read)


def test_a_scene_by_hand():
    """A line of 4 letters across the middle of 64 x 64 pixels, of which the third is wrong."""
    box = np.array([[0, 24], [64, 24], [64, 40], [0, 40]])
    letters = scenes.spread("abxd", box)
    assert letters[2] == ("x", 40.0, 32.0, 16.0)
    found = scenes.scene_map("abcd", letters, 64, 64)
    near = np.exp(-0.5 * (np.arange(4) - 2.0) ** 2 / 0.09)
    assert found.shape == (4, 4) and found.dtype == np.float32
    # Columns are where the letters are; the distance up or down is the same for all of them.
    expected = 1 - near[0] / np.exp(-0.5 * np.arange(4.0) ** 2 / 0.09).sum()
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
    assert found.argmin(1).tolist() == [2] * 4 and (found[0] == found[3]).all()
    assert (scenes.scene_map("abcd", [], 64, 64) == 0).all()
    assert (scenes.scene_map("AB CD", scenes.spread("ab ＣD", box), 64, 64) == 1).all()
    assert scenes.scene_map("a", letters, 8, 100).shape == (1, 6)


def test_a_line_that_is_turned():
    up = scenes.spread("ab", np.array([[10, 40], [10, 0], [20, 0], [20, 40]]))  # from below
    assert [letter[1:] for letter in up] == [(15.0, 30.0, 20.0), (15.0, 10.0, 20.0)]
