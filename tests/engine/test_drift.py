"""How far images are from the base's: colors, diversity, precision and recall, by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_cases import small_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tempflow import __main__ as command
from tempflow.errors import UserError
from tempflow.run import drift
from tempflow.run.diversity import distances, mean_distance, precision_and_recall, thumbnails
from tempflow.run.drift import Looks, between_folders, join, look
from tempflow.training.evaluator import Evaluator

# 60 gray levels on average
INKS = np.array([[20, 30, 40], [120, 30, 40], [20, 120, 40], [80, 60, 120]])


def words(inks, paper=250, size=(32, 96)):
    """Paper with a bar of ink on it, uint8 [n, *size, 3]."""
    images = np.full((len(inks), *size, 3), paper, np.uint8)
    for image, ink in zip(images, inks, strict=True):
        image[size[0] // 4 : size[0] // 2, size[1] // 4 : -size[1] // 4] = ink
    return images


def photos(count, seed=0):
    """Noise: no part of the border is background."""
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("paper", [250, 200])
@pytest.mark.parametrize("size", [(32, 96), (64, 64), (37, 53), (64, 1040)])
def test_the_ink_is_what_is_not_background(paper, size):
    found = look(words(INKS, paper, size))
    np.testing.assert_allclose(found.ink, INKS)
    np.testing.assert_allclose(
        found.whole, words(INKS, paper, size).mean((1, 2)), rtol=1e-6 if size[1] < 512 else 0.05
    )
    assert found.plain.all() and found.there.all()


def test_an_image_of_nothing_has_the_color_that_stands_out_most():
    """And so a policy that fades the words away is told of by a large shift, not by a gap."""
    blank = np.full((1, 32, 96, 3), 250, np.uint8)
    blank[0, 10:20, 20:36] = 240  # 5% of the pixels, a shade darker
    np.testing.assert_allclose(look(blank).ink, [[240, 240, 240]])
    assert drift.metrics(look(words(INKS[:1])), look(blank))["drift/color_shift"] > 300


def test_photos_have_no_background():
    found = look(photos(3))
    assert not found.plain.any()
    other = photos(3) // 2 + 40
    expected = np.linalg.norm(other.mean((0, 1, 2)) - photos(3).mean((0, 1, 2)))
    assert drift.metrics(found, look(other))["drift/color_shift"] == pytest.approx(
        expected, rel=1e-5
    ), "of whole images"


def test_shift_and_spread_by_hand():
    base = look(words(INKS))
    moved = drift.metrics(base, look(words(INKS + [12, 0, 5])))
    assert moved["drift/color_shift"] == pytest.approx(13.0) and moved[
        "drift/color_spread"
    ] == pytest.approx(1.0)
    alike = drift.metrics(base, look(words(60 + (INKS - 60) // 10 * 7)))
    assert alike["drift/color_shift"] == pytest.approx(0.0) and alike[
        "drift/color_spread"
    ] == pytest.approx(0.7)
    assert alike["drift/diversity"] < 1


def test_against_itself_nothing_has_moved():
    found = look(words(INKS))
    expected = {
        "drift/color_shift": 0,
        "drift/color_spread": 1,
        "drift/diversity": 1,
        "eval/precision": 1,
        "eval/recall": 1,
    }
    assert drift.metrics(found, found, 3) == expected
    assert "eval/recall" not in drift.metrics(found, found) and "eval/recall" not in drift.metrics(
        found, found, 4
    )
    one = found.pick([0])
    assert drift.metrics(one, one) == {"drift/color_shift": 0}, "a single image varies from none"


def test_diversity_is_that_between_prompts():
    base, now = words(INKS), words(INKS // 2)
    expected = mean_distance(thumbnails(now)[None])[0] / mean_distance(thumbnails(base)[None])[0]
    assert drift.metrics(look(base), look(now))["drift/diversity"] == pytest.approx(
        expected, abs=0.01
    )


def test_missing_images_are_in_no_pair():
    """Base and now lose different ones; what is left is compared prompt by prompt."""
    here, there = np.array([True, True, True, False]), np.array([False, True, True, True])
    found = drift.metrics(look(words(INKS), here), look(words(INKS + 9), there))
    both = here & there
    assert found == drift.metrics(look(words(INKS[both])), look(words(INKS[both] + 9)))
    assert drift.metrics(look(words(INKS), here), look(words(INKS), ~here)) == {}


@given(st.integers(1, 5), st.integers(1, 4))
def test_portions_do_not_matter(count, size):
    images = photos(count)
    parts = [look(images[first : first + size]) for first in range(0, count, size)]
    assert join(parts).pack() == look(images).pack()


def test_looks_survive_a_checkpoint():
    found = look(words(INKS), np.array([True, False, True, True]))
    again = Looks.unpack(json.loads(json.dumps(found.pack())))
    for name in ("ink", "whole", "plain", "thumbnails"):
        one, other = getattr(found, name), getattr(again, name)
        assert one.dtype == other.dtype and np.array_equal(
            one, other, equal_nan=one.dtype == np.float32
        )
    assert not found.there[1] and len(again) == 4


def test_a_checkpoint_of_an_earlier_version_has_no_drift():
    """The evaluator takes up what a state holds; one without looks leaves drift out, and the gain
    stays."""
    session = SimpleNamespace(heldout=[None] * 4)
    first, later, earlier = (Evaluator(session, None) for _ in range(3))
    first.base_reward, first.base_rewards, first.base_looks = (
        0.5,
        np.array([0.25, np.nan, 0.5, 0.75], np.float32),
        look(words(INKS)),
    )
    state = json.loads(json.dumps(first.state()))
    later.load(state)
    assert later.base_looks.pack() == first.base_looks.pack() and np.array_equal(
        later.base_rewards, first.base_rewards, equal_nan=True
    )
    earlier.load({key: value for key, value in state.items() if key != "base_looks"})
    assert (
        earlier.base_looks is None
        and earlier.base_rewards is not None
        and earlier.state()["base_looks"] is None
    )


def test_a_video_is_seen_through_its_frames():
    videos = np.stack([words(INKS[:2]), words(INKS[2:])])
    found = look(videos)
    np.testing.assert_allclose(found.ink, [INKS[:2].mean(0), INKS[2:].mean(0)])


# ----------------------------------------------------------------------------- precision and recall
def test_precision_and_recall_on_a_line():
    """Balls of radius 1 around the base's points hold all of now's; of radius 0 around now's, one
    of the base's."""
    base, now = (np.array(points, dtype=float)[:, None] for points in ([0, 1, 2, 3], [0, 0, 0, 0]))
    assert precision_and_recall(base, now, 1) == (4 / 4, 1 / 4)
    assert precision_and_recall(now, base, 1) == (1 / 4, 4 / 4)


def test_distances_are_exact():
    """Equal points are at 0, and a distance is the same from both sides: a ball of radius 0 holds
    its point."""
    points = np.random.default_rng(0).integers(0, 256, (9, 3072), dtype=np.uint8)
    points[4] = points[7]
    apart, exact = (
        distances(points, points),
        [[sum((int(x) - int(y)) ** 2 for x, y in zip(a, b)) for b in points] for a in points],
    )
    assert (apart == np.sqrt(exact)).all() and (apart == apart.T).all() and apart[4, 7] == 0


@given(st.integers(4, 9), st.integers(4, 9), st.integers(1, 3), st.integers(0, 10**6))
def test_precision_and_recall_by_counting(n, m, k, seed):
    rng = np.random.default_rng(seed)
    base, now = rng.integers(0, 4, (n, 2)).astype(float), rng.integers(1, 6, (m, 2)).astype(float)

    def inside(points, centers):
        radii = [
            sorted(np.linalg.norm(np.delete(centers, i, 0) - c, axis=1))[k - 1]
            for i, c in enumerate(centers)
        ]
        return np.mean(
            [any(np.linalg.norm(p - c) <= r for c, r in zip(centers, radii)) for p in points]
        )

    assert precision_and_recall(base, now, k) == pytest.approx(
        (inside(now, base), inside(base, now))
    )


# ------------------------------------------------------------------------------------------ folders
def write(folder: Path, images) -> Path:
    folder.mkdir()
    for n, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{n:04d}.png")
    return folder


def test_two_folders_of_images(tmp_path):
    base, now = write(tmp_path / "base", words(INKS)), write(tmp_path / "now", words(INKS[:3] + 7))
    expected = drift.metrics(look(words(INKS[:3])), look(words(INKS[:3] + 7)), 1)
    assert between_folders(base, now, 1) == expected, "of the names that both have"


def test_the_command_prints_it(tmp_path, monkeypatch, capsys):
    base, now = write(tmp_path / "base", words(INKS)), write(tmp_path / "now", words(INKS + 7))
    monkeypatch.setattr("sys.argv", ["tempflow", "drift", str(base), str(now), "--neighbors", "2"])
    assert command.main() == 0 and json.loads(capsys.readouterr().out) == between_folders(
        base, now, 2
    )


@pytest.mark.parametrize(
    "images, wrong",
    [([], "no PNG or WebP files of the same names"), (photos(1), "different sizes")],
)
def test_folders_without_a_pair(tmp_path, images, wrong):
    with pytest.raises(UserError, match=wrong):
        between_folders(write(tmp_path / "base", words(INKS)), write(tmp_path / "now", images))


# ------------------------------------------------------------------------------------------- config
@pytest.mark.parametrize(
    "table, expected",
    [
        (
            {"precision_recall": 2, "prompts": 2},
            ["eval.precision_recall: 2 neighbors", "eval.prompts is 2"],
        ),
        ({"precision_recall": 0}, ["eval.precision_recall"]),
        (
            {"stop": {"metric": "eval/recall", "below": 0.5}},
            ["eval.stop.metric: 'eval/recall'", "drift/color_shift"],
        ),
        (
            {"stop": {"metric": "drift/color_shift", "patience": 2}},
            ["eval.stop.patience", "drift/color_shift", "eval.stop.above"],
        ),
    ],
)
def test_refused_settings(table, expected):
    with pytest.raises(UserError) as error:
        small_config(eval={"every": 2, **table})
    assert all(word in str(error.value) for word in expected), error.value


def test_a_reward_of_the_metrics_name_is_refused():
    with pytest.raises(UserError, match="rewards.recall: eval/recall"):
        small_config(
            rewards={"recall": {"type": "jpeg"}}, eval={"prompts": 4, "precision_recall": 3}
        )


@pytest.mark.parametrize(
    "stop, best",
    [
        ({"metric": "drift/color_shift", "above": 15.0}, "eval/reward"),
        ({"metric": "drift/color_spread", "patience": 2}, "drift/color_spread"),
        ({"metric": "eval/recall", "below": 0.5, "patience": 1}, "eval/recall"),
    ],
)
def test_rules_about_drift(stop, best):
    assert (
        small_config(
            eval={"every": 2, "prompts": 4, "precision_recall": 3, "stop": stop}
        ).best_metric()
        == best
    )
