"""OCR readings against the word that the prompt asks for: which letters are right, wrong or
missing."""

from __future__ import annotations

import unicodedata
from html import escape

from tempflow.rewards.normal_form import normalize

GAP = "_"
MARKS = {
    "right": "{}",
    "wrong": '<mark title="wrong letter">{}</mark>',
    "missing": '<mark class="gap" title="missing letter">{}</mark>',
}


def compare(reading: str, target: str) -> list[tuple[str, str]]:
    """(letter, "right" | "wrong" | "missing") along the reading, by the edit distance that the
    reward counts.

    A letter whose normal form has several (a ligature, a fraction) is followed by empty ones for
    the rest of them.
    """
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
    """The reading with its wrong and missing letters marked, also for eyes and readers that see no
    colour.

    target: "" where the prompt quotes nothing; solved: the reward counts the reading as right as it
    is.
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
    """left[i][j]: edits between a[i:] and b[j:]."""
    left = [[len(a) - i + len(b) - j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            left[i][j] = min(
                left[i + 1][j] + 1, left[i][j + 1] + 1, left[i + 1][j + 1] + (a[i] != b[j])
            )
    return left
