"""Rewards of images in runs of videos: which frames they are given, by which way, and what becomes
of frames that fail."""

import numpy as np
import pytest
from served_rewards import Still
from server_cases import client, noise, served, serving

from tempflow.errors import UserError
from tempflow.rewards import (
    Reward,
    RewardPool,
    RewardSpec,
    Scores,
    check_frames,
    parse_rewards,
    probe,
)
from tempflow.rewards.frames import FrameMean, chosen_frames
from tempflow.types import Size

PROMPTS, METADATA = ["a", "b", "c"], [{"n": 0}, {"n": 1}, {"n": 2}]
STILL, MOTION = "served_rewards:Still", "served_rewards:Motion"


def videos(count=3, frames=9):
    return noise(count * frames).reshape(count, frames, 9, 13, 3)


def spec(kind, frames=None, name="r", **options):
    return RewardSpec(name, 1.0, options, kind, frames)


def mean_of(media, places):
    """Still's value of each video, in float64."""
    return media[:, places].astype(np.float64).mean(axis=(2, 3, 4)).mean(axis=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_reward_scores_evenly_spaced_frames(workers):
    media, finite = videos(), np.array([True, True, False])
    with RewardPool([spec(STILL, 3), spec(MOTION, 5, "motion")], workers=workers) as pool:
        (found,) = pool.gather([pool.submit(media, PROMPTS, METADATA, finite=finite)])
    assert np.allclose(found["r"].values[:2], mean_of(media, [0, 4, 8])[:2]) and np.isnan(
        found["r"].values[2]
    )
    assert [text.split(" | ")[0] for text in found["r"].details] == [
        "a {'n': 0} (9, 13, 3)",
        "b {'n': 1} (9, 13, 3)",
        text_of_missing(),
    ]
    assert found["motion"].details[:2] == ["(5, 9, 13, 3)"] * 2, (
        "a reward of videos with frames gets a video of as many"
    )


def text_of_missing():
    from tempflow.rewards.pool import NOT_FINITE

    return NOT_FINITE


def test_frames_that_fail_are_left_out_of_the_mean():
    class Faulty(Reward):
        def score(self, images, prompts, metadata):
            return Scores(
                np.array([1.0, np.nan, 3.0, np.nan, np.inf, np.nan]), ["x", "y", "x", "", "z", ""]
            )

    found = FrameMean(Faulty()).score(videos(2, 3), ["a", "b"], [{}, {}])
    assert found.values[0] == 2.0 and np.isnan(found.values[1])
    assert found.details == ["x | y", "not scored: an infinite value"]


def test_maps_of_frames_are_averaged():
    class Mapped(Reward):
        def score(self, images, prompts, metadata):
            return Scores(
                np.array([1.0, np.nan, 3.0]), maps=np.float32([[[1, 2]], [[9, 9]], [[3, 6]]])
            )

    found = FrameMean(Mapped()).score(videos(1, 3), ["a"], [{}])
    assert found.maps.tolist() == [[[2.0, 4.0]]]


def test_only_the_chosen_frames_are_sent():
    """Copied, so that the caller may go on with the array, and no more of it."""
    media = videos(3, 81)
    chosen = chosen_frames(media, np.array([0, 2]), 4)
    assert (
        chosen.shape == (2, 4, 9, 13, 3)
        and chosen.base is None
        and np.array_equal(chosen[1], media[2, [0, 27, 53, 80]])
    )
    assert chosen_frames(media[:, 0], np.array([1]), 4).shape == (1, 1, 9, 13, 3)


@pytest.mark.parametrize(
    "kind, frames, size, message",
    [
        (STILL, None, 5, 'rewards.r: scores images, but the model makes videos; add "frames": 4'),
        (STILL, 6, 5, "rewards.r.frames: 6 is more than rollout.frames, which is 5"),
        (MOTION, 2, 1, "rewards.r.frames: 2 is more than rollout.frames, which is 1"),
        ("http", None, 5, "rewards.r: scores images"),
    ],
)
def test_a_run_that_cannot_be_scored_is_refused(kind, frames, size, message):
    options = {"url": "http://127.0.0.1:1"} if kind == "http" else {}
    with pytest.raises(UserError, match=message):
        check_frames([spec(kind, frames, **options)], Size(8, 8, size))


def test_runs_that_can_be_scored_are_not_refused():
    check_frames(
        [
            spec(STILL, 5),
            spec(MOTION, name="m"),
            spec("http", name="h", url="http://127.0.0.1:1", videos=True),
        ],
        Size(8, 8, 5),
    )
    check_frames([spec(STILL), spec(STILL, 1, "one")], Size(8, 8))


@pytest.mark.parametrize("frames", [0, -1, True, 2.0, "4", [4]])
def test_frames_are_a_number(frames):
    with pytest.raises(
        UserError, match="rewards.jpeg.frames: expected a whole number of at least 1"
    ):
        parse_rewards({"jpeg": {"frames": frames}})


def test_frames_are_no_option_of_the_reward():
    assert parse_rewards({"jpeg": {"frames": 4, "goal": "large"}}) == [
        RewardSpec("jpeg", 1.0, {"goal": "large"}, "", 4)
    ]


# ---------------------------------------------------------------------------------------- over HTTP
@pytest.fixture(scope="module")
def server():
    with serving(served("Still"), served("Motion"), batch=2) as url:
        yield url


def test_a_server_scores_frames_and_videos_as_a_worker_does(server):
    """Image by image where the entry says frames; whole videos where it says videos, in batches of
    the server's size."""
    media = videos()
    specs = [
        spec("http", 3, "still", url=server, reward="Still"),
        spec("http", None, "motion", url=server, reward="Motion", videos=True),
        spec(MOTION, name="here"),
    ]
    with RewardPool(specs, workers=1) as pool:
        probe(pool, specs, PROMPTS, METADATA, Size(9, 13, 9))
        (found,) = pool.gather([pool.submit(media, PROMPTS, METADATA)])
    assert (
        np.allclose(found["still"].values, mean_of(media, [0, 4, 8]))
        and found["still"].details[1] == "b {'n': 1} (9, 13, 3)"
    )
    assert (
        np.array_equal(found["motion"].values, found["here"].values)
        and found["motion"].details == ["(9, 9, 13, 3)"] * 3
    )


def test_a_server_refuses_videos_for_a_reward_of_images(server):
    specs = [spec("http", url=server, reward="Still", videos=True, wait_s=0.0)]
    with (
        RewardPool(specs, workers=1, retries=0) as pool,
        pytest.raises(UserError, match="'Still' scores images, but the request has videos"),
    ):
        probe(pool, specs, PROMPTS, METADATA, Size(9, 13, 9))


def test_large_batches_are_sent_in_several_requests(server, monkeypatch):
    asked = []
    monkeypatch.setattr("tempflow.rewards.http.client.PIXELS", 9 * 13 * 9 * 2)
    reward, media = client(server, "Motion", videos=True), videos(5)
    ask = reward._ask
    monkeypatch.setattr(
        reward, "_ask", lambda images, *rest: asked.append(len(images)) or ask(images, *rest)
    )
    found = reward.score(media, list("abcde"), [{}] * 5)
    assert asked == [2, 2, 1] and np.array_equal(
        found.values, Still.level(media[:, -1]) - Still.level(media[:, 0])
    )
