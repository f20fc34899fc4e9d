"""Text that was typed against text that was read: one normal form for both, and how far they are
apart.

The normal form makes equal what nobody who reads an image can tell apart, or what a reader program
writes in its own way: case, white space, characters of no width, compatibility forms (full-width
letters, ligatures, superscripts, fractions: Unicode's NFKC), and the typographic kinds of
apostrophes, quotation marks and dashes. Accents, punctuation and look-alikes of other alphabets
stay different.
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
    """The normal form of a text: what two texts are compared by."""
    # Marks are replaced before NFKC as well, which makes a space and a combining accent of a
    # free-standing accent.
    text = unicodedata.normalize("NFKC", _visible(text).translate(_SAME))
    text = unicodedata.normalize("NFKC", text.casefold()).translate(_SAME)
    return _visible(text).replace("''", '"')


def _visible(text: str) -> str:
    """Without white space, controls, format characters (soft hyphen, joiners, direction marks) and
    selectors of a variant."""
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
    """1 - min(edit distance, len(target)) / len(target) of the normal forms; 1 if `contained` and
    it is."""
    target, text = normalize(target), normalize(text)
    if contained and target in text:
        return 1.0
    if len(text) >= 2 * len(target):  # the distance is at least the difference in length
        return 0.0
    return 1.0 - min(edit_distance(target, text), len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, each of cost 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
