"""Which text a prompt quotes: what the `ocr` reward looks for in its images.

Every mark must have a part in the reading: it opens, it closes, or it stands for inches after a
number. Where that can be read in one way only, the first quoted text is the target; where it cannot
be read, or in several ways, the prompt is refused. Nothing is guessed, because a wrong target
trains toward a wrong image without anybody noticing.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from tempflow.errors import shown
from tempflow.rewards.normal_form import normalize

# What opens, and what closes it. The same mark on both sides: by the letters and spaces around it.
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
INCHES = frozenset('"“”＂')
MOST_MARKS, MOST_READINGS = 200, 1000

Spans = tuple[tuple[int, int], ...]


class Unreadable(ValueError):
    """A prompt without exactly one reading; the message says why, as what follows "prompt ..."."""


@lru_cache(maxsize=65536)
def read_quotes(prompt: str) -> tuple[str, bool]:
    """(the first text in quotation marks, without the space around it; whether others follow).
    Raises Unreadable."""
    marks = [i for i, char in enumerate(prompt) if char in MARKS]
    if any(i and prompt[i - 1] == "\\" for i in marks):
        raise Unreadable("has a backslash before a quotation mark; write the marks as they are")
    found = _readings(prompt, marks)
    if not found:
        raise Unreadable(
            "has quotation marks that do not pair, are of different kinds, or stand within others"
        )
    if len({spans[:1] for spans in found}) > 1:
        texts = " or ".join(
            sorted(
                {shown(prompt[slice(*spans[0])]) if spans else "none" for spans in found}, key=len
            )[:3]
        )
        raise Unreadable(f"has marks that stand for quotes or for inches; it may quote {texts}")
    spans = min(found, key=len)
    if not spans:
        raise Unreadable("has no text in quotation marks")
    text = prompt[slice(*spans[0])].strip()
    if not normalize(text):
        raise Unreadable("has nothing between its quotation marks")
    between = zip([0, *(stop for _, stop in spans)], [*(start for start, _ in spans), len(prompt)])
    if not any(char.isalnum() for start, stop in between for char in prompt[start:stop]):
        raise Unreadable(
            "has all its words in quotation marks, so these may be the file's and not the image's"
        )
    return text, len(spans) > 1


def quoted_text(prompt: str) -> str:
    """The text that a prompt quotes, for showing; "" where there is none, or more than one
    reading."""
    try:
        return read_quotes(prompt)[0]
    except Unreadable:
        return ""


def _readings(text: str, marks: list[int]) -> set[Spans]:
    """The quoted texts, by every way to give each mark a part."""
    if len(marks) > MOST_MARKS:
        raise Unreadable(f"has {len(marks)} quotation marks, more than {MOST_MARKS}")
    # the mark that is open, the texts that are closed
    states: set[tuple[int | None, Spans]] = {(None, ())}
    for i in marks:
        states = {state for opened, spans in states for state in _steps(text, i, opened, spans)}
        if len(states) > MOST_READINGS:
            raise Unreadable(
                f"has marks that stand for quotes or for inches in more than {MOST_READINGS} ways"
            )
    return {spans for opened, spans in states if opened is None}


def _steps(text: str, i: int, opened: int | None, spans: Spans):
    """What the mark at `i` may do: stand for inches, open a text, or close the open one."""
    if text[i] in INCHES and _after_a_number(text, i):
        yield opened, spans
    if opened is None and _may_open(text, i):
        yield i, spans
    if opened is not None and _may_close(text, opened, i):
        yield None, (*spans, (opened + 1, i))


def _may_open(text: str, i: int) -> bool:
    mark = text[i]
    if mark not in PAIRS or mark not in PAIRS[mark]:
        return mark in PAIRS
    return _side(text, i) != "after" and not _is_number(text[i - 1 : i])


def _may_close(text: str, opened: int, i: int) -> bool:
    mark = text[opened]
    return text[i] in PAIRS[mark] and (text[i] != mark or _side(text, i) != "before")


def _side(text: str, i: int) -> str:
    """Whether a mark stands "before" a text, "after" one, or may do "either", as Markdown tells the
    sides of `*` apart."""
    left, right = _kind(text[i - 1 : i] if i else ""), _kind(text[i + 1 : i + 2])
    before = right != "space" and (right == "letter" or left != "letter")
    after = left != "space" and (left == "letter" or right != "letter")
    return "either" if before == after else "before" if before else "after"


def _kind(char: str) -> str:
    if not char or char.isspace():
        return "space"
    return "sign" if unicodedata.category(char)[0] in "PS" else "letter"


def _after_a_number(text: str, i: int) -> bool:
    """As 27" or, with a blank before the mark, 27 " wide."""
    if i >= 2 and text[i - 1] == " " and _kind(text[i + 1 : i + 2]) != "letter":
        return _is_number(text[i - 2])
    return i > 0 and _is_number(text[i - 1])


def _is_number(char: str) -> bool:
    return bool(char) and unicodedata.category(char) in ("Nd", "No")
