"""Which text a prompt quotes: every mark is read as meant, or the prompt is refused; never a
guess."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow.errors import UserError
from tempflow.rewards.ocr import OcrReward
from tempflow.rewards.quotes import ACCEPTED, Unreadable, quoted_text, read_quotes

READ = {
    "straight": ('a neon sign that says "LAUNDRY"', "LAUNDRY"),
    "curly": ("a chalkboard with “Soup of the Day”, morning light", "Soup of the Day"),
    "German": ("ein Wegweiser mit „Zum See“ im Nebel", "Zum See"),
    "Polish": ("szyld z napisem „Piekarnia” na ulicy", "Piekarnia"),
    "Swedish": ("en skylt med texten ”Öppet” i neon", "Öppet"),
    "French": ("une enseigne «\u202fBoulangerie\u202f», le soir", "Boulangerie"),
    "French, wide spaces": ("une enseigne «\u00a0Bar Tabac\u00a0» rouge", "Bar Tabac"),
    "Danish": ("et skilt med »Kaffe« på", "Kaffe"),
    "Chinese": ("一家店的招牌写着“欢迎光临”", "欢迎光临"),
    "Chinese, straight": ('门上写着"推"字', "推"),
    "Japanese": ("駅の看板に「出口」と書いてある", "出口"),
    "Japanese, double": ("ノートの表紙に『日記』とある", "日記"),
    "full width": ("海报上写着＂夏日＂两个字", "夏日"),
    "no spaces": ('the word"MILK"on a carton', "MILK"),
    "in brackets": ('a van ("FRESH FISH") by the harbor', "FRESH FISH"),
    "spaces inside": ('a mug with " TEA " on it', "TEA"),
    "signs inside": ('a price tag:"-20%"!', "-20%"),
    "apostrophe inside": ("a doormat with “Nan’s House”", "Nan’s House"),
    "the first of two": ('"LEFT" beside "RIGHT"', "LEFT"),
    "a number at the end": ('a clapperboard marked "Scene 4", "Take 2"', "Scene 4"),
    "the first of two, close": ('a slate marked "Scene 4"/"Take 2"', "Scene 4"),
    "inches before": ('a 19" rack with a label "SPARE"', "SPARE"),
    "inches after": ('a crate stamped "FRAGILE" under a 40" shelf', "FRAGILE"),
    "inches, with a blank": ('a 32 " monitor that shows "HELLO"', "HELLO"),
    "inches by a word processor": ("a 32” monitor that shows “HELLO”", "HELLO"),
    "inches within": ('a board with "16" PIZZA" in chalk', '16" PIZZA'),
    "feet and inches": ('a 5\'11" guard with a badge "STAFF"', "STAFF"),
    "feet": ('a 6\' fence with "KEEP OUT" on it', "KEEP OUT"),
    "half an inch": ('a ½" drill in a box "TOOLS"', "TOOLS"),
    "sides": ('a 4"x6" print with "LISBON" below', "LISBON"),
    "a bus": ('bus 7 "Airport" at a stop', "Airport"),
}

REFUSED = {
    "no marks": ("a barn in the snow", "no text in quotation marks"),
    "single marks": ("a door that says 'PULL'", "no text in quotation marks"),
    "backticks": ("a screen with `ls` on it", "no text in quotation marks"),
    "book titles": ("封面写着《红楼梦》", "no text in quotation marks"),
    "entities": ("a sign &quot;OPEN&quot;", "no text in quotation marks"),
    "inches alone": ('a 27" and a 32" monitor', "no text in quotation marks"),
    "odd": ('a sign "HALF of it', "do not pair"),
    "a stray one": ('a sign "WHOLE" and " beside it', "do not pair"),
    "closed before opened": ('loud" music and "bass', "do not pair"),
    "closed twice": ("closed” and open” signs", "do not pair"),
    "mixed": ('a sign “OPEN"', "different kinds"),
    "German, typed halfway": ('ein Schild „OFFEN"', "different kinds"),
    "opened twice": ("a sign “OPEN“ at night", "do not pair"),
    "within others": ("a note “he said „hi“ twice” on a desk", "inside others"),
    "doubled": ('a shop with ""BREAD"" on it', "do not pair"),
    "around all of it": ('"a shop with "BREAD" on it"', "do not pair"),
    "around all, none inside": ('"a red barn in the snow"', "all its words"),
    "around all, and a comma": ('"a red barn in the snow",', "all its words"),
    "two columns": ('"a red barn","photo"', "all its words"),
    "escaped": ('a shop with \\"BREAD\\" on it', "backslash"),
    "inches or a quote": ('a record "Side 1" and a 7" sleeve', "may quote"),
    "nothing inside": ('a blank sign "" here', "nothing between"),
    "a space inside": ("a blank sign “ ” here", "nothing between"),
    "no width inside": ("a blank sign “\u200b” here", "nothing between"),
    "a thousand": ('"a" ' * 1000, "quotation marks, more than"),
}


@pytest.mark.parametrize("prompt, target", READ.values(), ids=READ)
def test_read(prompt, target):
    assert read_quotes(prompt)[0] == quoted_text(prompt) == target


@pytest.mark.parametrize("prompt, reason", REFUSED.values(), ids=REFUSED)
def test_refused_with_the_line_and_what_counts(prompt, reason):
    assert quoted_text(prompt) == ""
    with pytest.raises(UserError) as error:
        OcrReward().check_prompts(
            ['a sign "FINE"', prompt], [{"source": "p.txt:1"}, {"source": "p.txt:2"}]
        )
    text = str(error.value)
    assert text.startswith("p.txt:2: prompt ") and reason in text, text
    assert (
        all(words in text for words in (ACCEPTED, 'says "OPEN"', '"ocr_target"'))
        and len(text) < 700
    )


def test_a_mark_too_many_in_either_reading_is_told_with_both():
    with pytest.raises(Unreadable, match="""'Side 1' or 'Side 1" and a 7'"""):
        read_quotes(REFUSED["inches or a quote"][0])


PAIRS = ['""', "“”", "„“", "„”", "””", "«»", "»«", "「」", "『』", "＂＂"]
WORDS = st.text("abcXYZ ,.-!’'&é日", min_size=1, max_size=12).filter(
    lambda text: any(char.isalnum() for char in text)
)


@given(WORDS, WORDS, WORDS, st.sampled_from(PAIRS), st.integers(1, 99), st.booleans())
def test_one_pair_is_found_wherever_it_stands(before, inside, after, pair, inches, measured):
    """With words around it, and after a measure in inches."""
    inside = inside.strip()
    measure = f'a {inches}" wide ' if measured else ""
    prompt = f"{measure}{before} {pair[0]}{inside}{pair[1]} {after}"
    assert read_quotes(prompt) == (inside, False)


@given(st.text('ab7 "“”„«»\\\n½', max_size=14))
def test_whatever_comes_is_read_or_refused(prompt):
    """And a target stands between two of its marks, with as many closed as opened."""
    try:
        target, _ = read_quotes(prompt)
    except Unreadable:
        return
    start = prompt.index(target)
    assert (
        target
        and prompt[:start].rstrip()[-1] in '"“”„«»'
        and prompt[start + len(target) :].lstrip()[0] in '"“”„«»'
    )


def test_many_inches_are_no_burden():
    assert read_quotes('a 3" by ' * 60 + 'a card "ACE" here') == ("ACE", False)
    with pytest.raises(Unreadable):
        read_quotes('x"y3" ' * 60)


def test_a_line_may_name_its_target():
    """In its metadata, whatever the marks; null is a table's way to say that it has none."""
    named = {"source": "p.jsonl:1", "ocr_target": "OPEN"}
    told = OcrReward().check_prompts(
        ["a shop sign", 'a 7" label "A"', 'a "B"'], [named, {**named, "ocr_target": None}, {}]
    )
    assert told == "OCR targets: 'OPEN', 'A', 'B'"
    for bad in ("", " ", 7, ["OPEN"], "\u200b"):
        with pytest.raises(UserError, match='p.jsonl:1: .* as "ocr_target", expected a text'):
            OcrReward().check_prompts(['a "B"'], [{**named, "ocr_target": bad}])


def test_targets_are_told():
    prompts = [f'the word "W{n}"' for n in range(9)] * 2 + ['"W0" over "W1" here']
    told = OcrReward().check_prompts(prompts, [{}] * len(prompts))
    assert (
        told
        == "OCR targets: 'W0', 'W1', 'W2', 'W3', 'W4' and 4 more; prompts that quote several texts,"
        " of which only the first counts: 1"
    )
