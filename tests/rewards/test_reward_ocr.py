"""The OCR reward: the distance by hand and by property, the reading on pictures rendered here."""

import random

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from tempflow.rewards.normal_form import edit_distance, normalize, similarity
from tempflow.rewards.ocr import OcrReward, reading_order

FONT = matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans-Bold.ttf"


@pytest.mark.parametrize(
    "a, b, distance",
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
        ("ab", "ba", 2),
        ("aaaa", "aa", 2),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance


word = st.text("abc", max_size=8)


@given(word, word, word)
def test_edit_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@given(word, word, st.integers(0, 8), st.sampled_from("abc"))
def test_one_edit_moves_the_distance_by_at_most_one(a, b, place, letter):
    edited = a[:place] + letter + a[place:]
    assert abs(edit_distance(edited, b) - edit_distance(a, b)) <= 1


@pytest.mark.parametrize(
    "target, text, whole, contained",
    [
        ("HELLO", "hello", 1, 1),
        ("HELLO", "He llo\n", 1, 1),
        ("HELLO", "HELO", 0.8, 0.8),
        ("HELLO", "HALLU", 0.6, 0.6),
        ("HELLO", "", 0, 0),
        ("HELLO", "say HELLO twice", 0, 1),
        ("HELLO", "HELLOX", 0.8, 1),
        ("AB", "XYZ", 0, 0),
        ("ABC", "ABCXYZ", 0, 1),
        ("New York", "NEWYORK", 1, 1),
    ],
)
def test_similarity(target, text, whole, contained):
    assert similarity(target, text) == pytest.approx(whole)
    assert similarity(target, text, contained=True) == pytest.approx(contained)


@given(st.text("abC ", min_size=1).filter(str.strip), st.text("abC ", max_size=20))
def test_similarity_is_the_formula(target, text):
    a, b = normalize(target), normalize(text)
    assert similarity(target, text) == pytest.approx(1 - min(edit_distance(a, b), len(a)) / len(a))
    assert (
        similarity(target, target)
        == 1
        >= similarity(target, text, contained=True)
        >= similarity(target, text)
        >= 0
    )


def test_reading_order():
    def box(x, y, height):
        return [[x, y], [x + 50, y], [x + 50, y + height], [x, y + height]]

    # "second" starts higher than "first" but is as tall as the line; "third" lies below both.
    boxes = np.array([box(0, 80, 30), box(120, 5, 60), box(10, 20, 40)], dtype=np.float32)
    assert reading_order(boxes) == [2, 1, 0]
    assert reading_order(np.zeros((0, 4, 2))) == []


def render_word(text, rng):
    picture = Image.new("RGB", (96, 32), tuple(rng.randint(190, 255) for _ in range(3)))
    draw, size = ImageDraw.Draw(picture), rng.randint(17, 23)
    while draw.textlength(text, font=ImageFont.truetype(FONT, size)) > 90:
        size -= 1
    place = (48 + rng.randint(-2, 2), 16 + rng.randint(-2, 2))
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    draw.text(place, text, font=ImageFont.truetype(FONT, size), fill=ink, anchor="mm")
    return np.array(picture)


def random_words(n):
    rng = random.Random(0)
    words = [
        "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(3, 5))) for _ in range(n)
    ]
    return words, np.stack([render_word(text, rng) for text in words])


@pytest.fixture(scope="module")
def line_reward():
    reward = OcrReward(detect=False)
    reward.load(threads=1)
    return reward


def as_batch(words):
    return [f'the word "{text}"' for text in words], [{} for _ in words]


def test_rendered_words_score_high(line_reward):
    words, images = random_words(100)
    scores = line_reward.score(images, *as_batch(words))
    assert scores.values.mean() >= 0.97
    assert sum(normalize(text) == word.lower() for text, word in zip(scores.details, words)) >= 93
    wrong = line_reward.score(images, *as_batch(words[1:] + words[:1])).values
    assert wrong.mean() < 0.25


def test_score_does_not_depend_on_the_batch(line_reward):
    words, images = random_words(11)
    together = line_reward.score(images, *as_batch(words))
    alone = [line_reward.score(images[i : i + 1], *as_batch(words[i : i + 1])) for i in range(11)]
    assert together.details == [scores.details[0] for scores in alone]


def test_line_reader_agrees_with_the_package(line_reward):
    """Same readings as rapidocr's own recogniser call on coloured words: channels, scaling and
    decoding agree."""
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "error", "Global.text_score": 0.0})
    words, images = random_words(12)
    theirs = [
        engine(image[..., ::-1].copy(), use_det=False, use_cls=False, use_rec=True).txts[0]
        for image in images
    ]
    assert line_reward.score(images, *as_batch(words)).details == theirs


def test_one_bad_picture_is_nan_and_the_others_are_scored(line_reward, monkeypatch):
    words, images = random_words(10)
    images[3] = 77
    read = line_reward._reader.read

    def refuse(batch, targets):
        if (batch == 77).all(axis=(1, 2, 3)).any():
            raise RuntimeError("bad picture")
        return read(batch, targets)

    monkeypatch.setattr(line_reward._reader, "read", refuse)
    scores = line_reward.score(images, *as_batch(words))
    assert np.isnan(scores.values).tolist() == [i == 3 for i in range(10)]
    assert scores.details[3] == "not scored: RuntimeError: bad picture"


def test_unquoted_prompt_is_nan_not_zero(line_reward):
    _, images = random_words(2)
    scores = line_reward.score(images, ["a cat", 'the word "A"'], [{}, {}])
    assert np.isnan(scores.values).tolist() == [True, False]
    assert len(scores.maps) == 2 and (scores.maps[0] == 0).all()


def test_the_map_is_low_where_a_letter_is_wrong(line_reward):
    rng = random.Random(1)
    images = np.stack([render_word(word, rng) for word in ("RATE", "RITE", "RATS", "rate")])
    scores = line_reward.score(images, *as_batch(["RATE"] * 4))
    rows, (right, second, last, small) = scores.maps.shape[1], scores.maps[:, 0]
    assert rows == 1 and right.min() > 0.9 and small.min() > 0.9
    # The second of four letters, in the middle of the line, is a little left of its center.
    assert abs(second.argmin() / len(second) - 0.45) < 0.1
    assert second.min() < 0.5 and second[[0, -1]].min() > 0.9
    assert last[-1] < 0.1 and last[0] > 0.9
    assert (scores.values == np.float32([1, 0.75, 0.75, 1])).all()


def test_scene_reward():
    picture = Image.new("RGB", (320, 200), (90, 140, 90))
    draw = ImageDraw.Draw(picture)
    for place, size, text in [
        ((20, 30), 42, "GRAND"),
        ((210, 40), 26, "HOTEL"),
        ((60, 130), 34, "open late"),
    ]:
        draw.text(place, text, font=ImageFont.truetype(FONT, size), fill=(250, 250, 240))
    images = np.stack([np.array(picture)] * 2 + [np.full((200, 320, 3), 128, np.uint8)])
    reward = OcrReward()
    reward.load(threads=1)
    scores = reward.score(
        images, ['a "Grand Hotel" front', 'a "Small Motel"', 'an empty "wall"'], [{}] * 3
    )
    assert normalize(scores.details[0]) == "grandhotelopenlate"
    assert scores.values[0] == 1
    assert scores.values[1] < 1 and scores.values[2] == 0
    assert scores.details[2] == ""
    right, wrong, nothing = scores.maps  # 12 x 20 cells of 16 x 16 pixels
    assert right.shape == (12, 20) and right.min() == 1 and nothing.max() == 0
    # "Motel" is "HOTEL" but for its first letter; of "Small" there is only the a of "GRAND".
    hotel = wrong[3, 13:]
    assert hotel[-3:].min() > 0.9 > 0.5 > hotel[0] and wrong[3, :5].max() < 0.2 < wrong[3, 6]
