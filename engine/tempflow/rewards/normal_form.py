"""Comparing the text of a prompt with the text that was read from an image: a normal form for both,
and their similarity.

The normal form removes differences that cannot be seen in an image, or that OCR models write in
their own way: case, white space, zero-width characters, compatibility forms (full-width letters,
ligatures, superscripts, fractions: Unicode's NFKC), and the typographic variants of apostrophes,
quotation marks and dashes. Accents, punctuation and look-alikes from other alphabets stay
different.
"""

from __future__ import annotations

import unicodedata

_SAME = str.maketrans(
    dict.fromkeys("‘’‚‛ʼʹ′´`ˋ", "'")
    | dict.fromkeys("“”„‟«»〝〞〟", '"')
    | dict.fromkeys("‐‑‒–—―−⁃﹘", "-")
    | {"⁄": "/", "∕": "/", "〜": "~"}
)


def normalize(text: str) -> str:
    """The normal form of a text. Two texts count as equal if their normal forms are equal."""
    # Marks are replaced before NFKC too, because NFKC turns a free-standing accent (´, which people
    # type for an apostrophe) into a space and a combining accent.
    text = unicodedata.normalize("NFKC", _visible(text).translate(_SAME))
    # Case folding can denormalize a text, so NFKC runs once more.
    text = unicodedata.normalize("NFKC", text.casefold()).translate(_SAME)
    # NFKC makes new spaces; two apostrophes look like a quotation mark.
    return _visible(text).replace("''", '"')


def _visible(text: str) -> str:
    """The text without white space, control characters, format characters (soft hyphen, joiners,
    direction marks) and variation selectors."""
    return "".join(
        char
        for char in text
        if not (
            char.isspace()
            or unicodedata.category(char) in ("Cc", "Cf")
            or "\ufe00" <= char <= "\ufe0f"
        )
    )


def similarity(target: str, text: str, *, contained: bool = False) -> float:
    """How much of the target a text shows, in [0, 1]: 1 - min(edit distance, n) / n, with both in
    their normal forms and n the target's length.

    Args:
        target: what the image should show; not empty in its normal form.
        text: what was read.
        contained: whether a text that contains the target counts as 1.
    """
    target, text = normalize(target), normalize(text)
    if contained and target in text:
        return 1.0
    # The distance is at least the difference in length. This saves the quadratic computation for
    # long texts, which an OCR model reads from texture.
    if len(text) >= 2 * len(target):
        return 0.0
    return 1.0 - min(edit_distance(target, text), len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, each of cost 1."""
    # One row of the table is kept: row[j] is the distance of the first i characters of `a`, and
    # the first j of `b`; `diagonal` is the previous row's value at j - 1.
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
