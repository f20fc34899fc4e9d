"""Condition images on their way to rewards: in this process, to workers, to a reward server, to a
judge, into CLIP."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from reward_helpers import answering
from reward_models import loaded
from server_cases import client, noise, serving
from test_reward_models import clip_outputs
from test_reward_server_refusals import png, post
from test_reward_vlm import fake, judge, says

from tempflow.errors import UserError
from tempflow.rewards import RewardPool, RewardSpec, build_reward, condition_images
from tempflow.rewards.conditions import scaled
from tempflow.rewards.fit import check_prompts
from tempflow.rewards.http.protocol import encode_png, write_request
from tempflow.rewards.http.server import Limits

TOLD = RewardSpec("told", 1.0, {}, "condition_rewards:Told")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two images of different sizes in files, and what they hold."""
    folder = tmp_path_factory.mktemp("conditions")
    pixels = [noise(1, 20, 30, seed=1)[0], noise(1, 24, 16, seed=2)[0]]
    for name, image in zip("ab", pixels):
        Image.fromarray(image).save(folder / f"{name}.png")
    return [str(folder / "a.png"), str(folder / "b.png")], pixels


@pytest.fixture(scope="module")
def entries(files):
    """Metadata of five images: by file, by array, two at once, none."""
    (a, b), (_, second) = files
    return [
        {"images": [a], "tag": 1},
        {"images": [a]},
        {"images": [second]},
        {"images": [b, a]},
        {},
    ]


@pytest.fixture(scope="module")
def server():
    limits = Limits(request_bytes=400_000, request_pixels=20_000)
    with serving(TOLD, limits=limits) as url:
        yield url


def expected(files):
    first, second = (image.mean(dtype=np.float64) for image in files[1])
    return np.float32([first, first, second, (first + second) / 2, np.nan])


def test_a_file_and_an_array_are_read_alike(files, tmp_path):
    (a, _), (first, second) = files
    read = condition_images({"images": [a, second]})
    assert np.array_equal(read[0], first) and read[1] is second and condition_images({}) == []
    assert not read[0].flags.writeable and condition_images({"images": [a]})[0] is read[0]
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="broken.png.*cannot be read as an image"):
        condition_images({"images": [str(tmp_path / "broken.png")]})


@pytest.mark.parametrize("workers", [0, 1])
def test_in_this_process_and_in_a_worker(files, entries, workers):
    with RewardPool([TOLD], workers=workers, retries=0) as pool:
        (scores,) = pool.gather([pool.submit(noise(5), [""] * 5, entries)])
    assert np.array_equal(scores["told"].values, expected(files), equal_nan=True)
    assert scores["told"].details == [
        "[(20, 30, 3)]",
        "[(20, 30, 3)]",
        "[(24, 16, 3)]",
        "[(24, 16, 3), (20, 30, 3)]",
        "[]",
    ]


def test_a_damaged_file_masks_and_is_told(tmp_path, files):
    """Its header was fine when the prompts were read."""
    whole = png(noise(1, 100, 100)[0])
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with RewardPool([TOLD], workers=1, retries=0) as pool:
        (scores,) = pool.gather(
            [pool.submit(noise(2), [""] * 2, [{"images": [str(tmp_path / "cut.png")]}] * 2)]
        )
        assert np.isnan(scores["told"].values).all() and "cut.png" in pool.last_error


def test_prompts_without_are_refused():
    """By a reward that needs condition images, among the prompts that are for it."""
    with pytest.raises(UserError, match="^f:2: prompt 'b' has no condition image"):
        check_prompts([TOLD], ["a", "b"], [{"images": ["x.png"]}, {"source": "f:2"}])
    other = RewardSpec("jpeg")
    check_prompts(
        [TOLD, other],
        ["a", "b"],
        [{"images": ["x.png"], "rewards": ["told"]}, {"rewards": ["jpeg"]}],
    )


# ------------------------------------------------------------------------------------ reward server
def test_through_the_server(server, files, entries):
    """The same values as here, the other metadata with them."""
    here = build_reward("condition_rewards:Told").score(noise(5), [""] * 5, entries)
    there = client(server, "told").score(noise(5), [""] * 5, entries)
    assert (
        np.array_equal(there.values, here.values.astype(np.float32), equal_nan=True)
        and there.details == here.details
    )


def test_each_condition_travels_once(files, entries):
    message = write_request("told", noise(5), [""] * 5, [entry.copy() for entry in entries])
    assert len(message["conditions"]) == 3 and message["conditions_of"] == [
        [0],
        [0],
        [1],
        [2, 0],
        [],
    ]
    assert message["metadata"] == [{"tag": 1}, {}, {}, {}, {}]
    json.dumps(message)


def test_requests_without_are_what_they_were(files):
    """Servers of earlier versions refuse keys that they do not know."""
    assert write_request("told", noise(1), ["a"], [{"tag": 1}]).keys() == {
        "reward",
        "images",
        "prompts",
        "metadata",
    }


def test_prompts_with_images_may_go_to_a_server(files):
    """Arrays are no JSON, but they are not sent as metadata."""
    spec = RewardSpec("told", 1.0, {"url": "http://127.0.0.1:1"}, "http")
    check_prompts(
        [spec], ["a", "b"], [{"images": [files[1][0]]}, {"images": [files[0][0]], "tag": "x"}]
    )
    with pytest.raises(UserError, match="metadata that cannot be sent"):
        check_prompts([spec], ["a"], [{"mask": files[1][0]}])


IMAGE = encode_png(noise(1)[0])


@pytest.mark.parametrize(
    "more, words",
    [
        ({"conditions": [IMAGE], "conditions_of": []}, "1 image, but 0 conditions_of"),
        ({"conditions": [IMAGE], "conditions_of": [[1]]}, "places from 0 to 0"),
        ({"conditions": [IMAGE], "conditions_of": [[-1]]}, "places from 0 to 0"),
        ({"conditions_of": [[0]]}, "conditions_of"),
        ({"conditions": ["no image"], "conditions_of": [[0]]}, "condition 0 is not a PNG file"),
        (
            {
                "conditions": [base64.b64encode(png(noise(1, 60, 60)[0])[:-4000]).decode()],
                "conditions_of": [[0]],
            },
            "condition 0 is a damaged PNG",
        ),
        (
            {
                "conditions": [base64.b64encode(png(noise(1, 200, 100, seed=3)[0])).decode()],
                "conditions_of": [[0]],
            },
            "pixels in one request",
        ),
        ({"metadata": [{"images": ["/etc/passwd"]}]}, 'the key "images" is not allowed'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages_refused(server, more, words):
    """Limits hold for images and condition images together; no request names files of the
    server."""
    status, error = post(server, {"images": [IMAGE], "prompts": [""], **more})
    assert status == 400 and words in error, error


def test_a_server_of_an_earlier_version_is_told_of(files, entries):
    """A run that needs condition images there does not start, and says which key is unknown."""
    reply = {"error": "conditions: Extra inputs are not permitted"}
    with answering(lambda path, headers, body: (400, {}, json.dumps(reply).encode())) as url:
        with pytest.raises(Exception, match="conditions: Extra inputs are not permitted"):
            build_reward("http", {"url": url, "wait_s": 0.0}).score(noise(1), [""], entries[:1])


# -------------------------------------------------------------------------------------------- judge
def shown(body):
    """The images of a chat request in order, and its text."""
    *parts, text = body["messages"][0]["content"]
    return [
        np.asarray(
            Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
        )
        for part in parts
    ], text["text"]


@pytest.mark.parametrize("yes_no", [False, True])
def test_the_judge_sees_conditions_before_the_image(files, yes_no):
    """Scaled to the image's longer side; asked by default whether the edit was made and the rest
    kept."""
    (a, b), (first, second) = files
    images = noise(1, 24, 18)
    answer = (
        {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": -0.01}]}]}}
        if yes_no
        else says('{"score": 5}')
    )
    with fake(answer) as (url, api):
        reward = judge(url, conditions=True, yes_no=yes_no)
        assert reward.score(images, ["make it night"], [{"images": [a, b]}]).values[0] > 0.4
    pictures, text = shown(api.bodies[0])
    assert [picture.shape for picture in pictures] == [(16, 24, 3), (24, 16, 3), (24, 18, 3)]
    assert (
        np.array_equal(pictures[0], scaled(first, 24))
        and np.array_equal(pictures[1], second)
        and np.array_equal(pictures[2], images[0])
    )
    assert "make it night" in text and "before it" in text and "instruction" in text


def test_the_judge_shows_none_unless_asked(files):
    with fake(says('{"score": 5}')) as (url, api):
        judge(url).score(noise(1), ["a"], [{"images": files[0]}])
    assert len(shown(api.bodies[0])[0]) == 1 and "instruction" not in shown(api.bodies[0])[1]
    with pytest.raises(UserError, match="has no condition image"):
        judge(url, conditions=True).check_prompts(["a"], [{}])


# --------------------------------------------------------------------------------------------- CLIP
def test_clip_image(models, files):
    """The cosine of CLIPModel's own embeddings, the mean over several condition images; 1 for the
    image itself, NaN without any."""
    (a, b), conditions = files
    images = noise(4, 40, 30)
    made = clip_outputs(models, images, [""] * 4)[0]
    first, second = (clip_outputs(models, [image], [""])[0][0] for image in conditions)
    reward = loaded(models, "clip_image", batch_size=3)
    given = [
        {"images": [a]},
        {"images": [conditions[1]]},
        {"images": [a, b]},
        {"images": [images[3]]},
    ]
    values = reward.score(images, [""] * 4, given).values
    wanted = torch.stack(
        [
            made[0] @ first,
            made[1] @ second,
            (made[2] @ first + made[2] @ second) / 2,
            torch.tensor(1.0),
        ]
    )
    torch.testing.assert_close(torch.from_numpy(values), wanted, rtol=1e-4, atol=1e-5)
    assert np.isnan(reward.score(images[:2], [""] * 2, [{}, given[0]]).values).tolist() == [
        True,
        False,
    ]
    with pytest.raises(UserError, match="^f:1: .* has no condition image"):
        reward.check_prompts(["a"], [{"source": "f:1"}])
