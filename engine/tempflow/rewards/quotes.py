"""Finds the text that a prompt quotes, which the `ocr` reward looks for in the images.

Every quotation mark must have a role: it opens a text, closes one, or means inches after a number.
If exactly one assignment of roles is possible, the first quoted text is the target. If there is
none, or several with different first texts, the prompt is refused. Nothing is guessed, because a
wrong target would train toward wrong images without anybody noticing.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from tempflow.errors import shown
from tempflow.rewards.normal_form import normalize

# Opening marks, each with the marks that close it. Where a mark is on both sides, the letters and
# spaces around it decide which it is. German closes „ with “, Swedish and Finnish quote ”so”.
PAIRS = {
    '"': '"',
    "“": "”",
    "„": "“”",
    "”": "”",
    "«": "»",
    "»": "«",
    "「": "」",
    "『": "』",
    "＂": "＂",
}
MARKS = frozenset([*PAIRS, *"".join(PAIRS.values())])
ACCEPTED = '"X" “X” „X“ „X” ”X” «X» »X« 「X」 『X』 ＂X＂'
INCHES = frozenset('"“”＂')  # word processors also turn the inch mark into a curly one
# The number of readings can double with each mark that may mean inches.
MOST_MARKS, MOST_READINGS = 200, 1000

Spans = tuple[tuple[int, int], ...]
"""The quoted texts of one reading: the places of their first character and after their last."""


class Unreadable(ValueError):
    """A prompt without exactly one reading. The message continues a sentence that begins with the
    prompt: "has no text in quotation marks"."""


@lru_cache(maxsize=65536)  # each prompt is scored in many batches
def read_quotes(prompt: str) -> tuple[str, bool]:
    """Read the quotation marks of a prompt.

    Returns:
        The first quoted text, without the space around it, and whether others follow.

    Raises:
        Unreadable: if no text is quoted, or if the marks have no reading or several.
    """
    marks = [i for i, char in enumerate(prompt) if char in MARKS]
    # A backslash was meant for a shell or for JSON, and would be in the prompt that is encoded.
    if any(i and prompt[i - 1] == "\\" for i in marks):
        raise Unreadable("has a backslash before a quotation mark; write the mark without it")
    found = _readings(prompt, marks)
    if not found:
        raise Unreadable(
            "has quotation marks that do not pair, are of different kinds, or are inside others"
        )
    # Readings may differ in later texts, as only the first one is the target.
    if len({spans[:1] for spans in found}) > 1:
        texts = " or ".join(
            sorted(
                {shown(prompt[slice(*spans[0])]) if spans else "none" for spans in found}, key=len
            )[:3]
        )
        raise Unreadable(f"has marks that can mean quotes or inches; it may quote {texts}")
    spans = min(found, key=len)  # all have the same first text
    if not spans:
        raise Unreadable("has no text in quotation marks")
    text = prompt[slice(*spans[0])].strip()
    if not normalize(text):
        raise Unreadable("has nothing between its quotation marks")
    # A file whose lines are quoted as a whole would otherwise ask for the entire prompt as text.
    between = zip([0, *(stop for _, stop in spans)], [*(start for start, _ in spans), len(prompt)])
    if not any(char.isalnum() for start, stop in between for char in prompt[start:stop]):
        raise Unreadable(
            "has all its words in quotation marks, so these may be the file format's quoting and"
            " not the text for the image"
        )
    return text, len(spans) > 1


def quoted_text(prompt: str) -> str:
    """The text that a prompt quotes, for display; "" if `read_quotes` would refuse the prompt."""
    try:
        return read_quotes(prompt)[0]
    except Unreadable:
        return ""


def _readings(text: str, marks: list[int]) -> set[Spans]:
    """The quoted texts of every possible assignment of roles to the marks."""
    if len(marks) > MOST_MARKS:
        raise Unreadable(f"has {len(marks)} quotation marks, more than {MOST_MARKS}")
    # Each state is (the place of the mark that is open or None, the texts that are closed). Equal
    # states are merged, which keeps the search small.
    states: set[tuple[int | None, Spans]] = {(None, ())}
    for i in marks:
        states = {state for opened, spans in states for state in _steps(text, i, opened, spans)}
        if len(states) > MOST_READINGS:
            raise Unreadable(
                f"has marks that can mean quotes or inches in more than {MOST_READINGS} ways"
            )
    return {spans for opened, spans in states if opened is None}


def _steps(text: str, i: int, opened: int | None, spans: Spans):
    """The states after each role that the mark at `i` can have: meaning inches, opening a text, or
    closing the open one."""
    if text[i] in INCHES and _after_a_number(text, i):
        yield opened, spans
    if opened is None and _may_open(text, i):
        yield i, spans
    if opened is not None and _may_close(text, opened, i):
        yield None, (*spans, (opened + 1, i))


def _may_open(text: str, i: int) -> bool:
    mark = text[i]
    if mark not in PAIRS or mark not in PAIRS[mark]:  # its shape says which side it is
        return mark in PAIRS
    return _side(text, i) != "after" and not _is_number(text[i - 1 : i])


def _may_close(text: str, opened: int, i: int) -> bool:
    mark = text[opened]
    return text[i] in PAIRS[mark] and (text[i] != mark or _side(text, i) != "before")


def _side(text: str, i: int) -> str:
    """Whether the mark at `i` is "before" a text, "after" one, or can be "either". The rule is
    Markdown's for `*` (CommonMark's left- and right-flanking delimiters)."""
    left, right = _kind(text[i - 1 : i] if i else ""), _kind(text[i + 1 : i + 2])
    before = right != "space" and (right == "letter" or left != "letter")
    after = left != "space" and (left == "letter" or right != "letter")
    return "either" if before == after else "before" if before else "after"


def _kind(char: str) -> str:
    if not char or char.isspace():
        return "space"
    return "sign" if unicodedata.category(char)[0] in "PS" else "letter"


def _after_a_number(text: str, i: int) -> bool:
    """Whether the mark at `i` can mean inches: as in 27" or, after a space, in 27 " wide."""
    if i >= 2 and text[i - 1] == " " and _kind(text[i + 1 : i + 2]) != "letter":
        return _is_number(text[i - 2])
    return i > 0 and _is_number(text[i - 1])


def _is_number(char: str) -> bool:
    return bool(char) and unicodedata.category(char) in ("Nd", "No")
