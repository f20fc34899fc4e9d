"""OCR readings compared with the word in the prompt: which letters are right, wrong or missing.

The alignment follows the edit distance of the OCR reward, so that the marks explain its value.
"""

from __future__ import annotations

import unicodedata
from html import escape

from tempflow.rewards.normal_form import normalize

GAP = "_"  # shown for a missing letter
MARKS = {
    "right": "{}",
    "wrong": '<mark title="wrong letter">{}</mark>',
    "missing": '<mark class="gap" title="missing letter">{}</mark>',
}


def compare(reading: str, target: str) -> list[tuple[str, str]]:
    """Align a reading with its target by the edit distance of the reward.

    Args:
        reading: what OCR read.
        target: the word that was asked for.

    Returns:
        (letter, "right" | "wrong" | "missing") along the reading. A letter whose normal form has
        several letters (a ligature, a fraction) is followed by empty ones for the rest of them.
    """
    # Each letter keeps its own look; only the comparison uses the normal form.
    forms = [
        (char, normalize(char)) for char in unicodedata.normalize("NFC", "".join(reading.split()))
    ]
    read = [char if n == 0 else "" for char, form in forms for n in range(len(form))]
    want, have = normalize(target), [letter for _, form in forms for letter in form]
    left = _distances(have, want)
    i = j = 0
    letters = []
    while i < len(have) or j < len(want):
        same = i < len(have) and j < len(want) and have[i] == want[j]
        if i < len(have) and j < len(want) and left[i][j] == left[i + 1][j + 1] + (not same):
            letters.append((read[i], "right" if same else "wrong"))
            i, j = i + 1, j + 1
        elif i < len(have) and left[i][j] == left[i + 1][j] + 1:
            letters.append((read[i], "wrong"))
            i += 1
        else:
            letters.append((GAP, "missing"))
            j += 1
    return letters


def reading_html(reading: str, target: str, solved: bool) -> str:
    """The reading as HTML with its wrong and missing letters marked, by more than color.

    Args:
        reading: what OCR read.
        target: the word that was asked for; "" where it is not known.
        solved: whether the reward counts the reading as right, whatever its letters.
    """
    if not reading.strip():
        return '<span class="reading none">nothing read</span>'
    if solved or not target:
        return f'<span class="reading{" exact" if solved else ""}">{escape(reading)}</span>'
    return (
        "<span"
        f' class="reading">{"".join(MARKS[state].format(escape(char)) for char, state in compare(reading, target))}</span>'
    )


def _distances(a: list[str], b: str) -> list[list[int]]:
    """left[i][j]: edit distance of a[i:] and b[j:], so that `compare` can walk from the start."""
    left = [[len(a) - i + len(b) - j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            left[i][j] = min(
                left[i + 1][j] + 1, left[i][j + 1] + 1, left[i + 1][j + 1] + (a[i] != b[j])
            )
    return left
