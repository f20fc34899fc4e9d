"""The vision-language judge against a local fake of the OpenAI-compatible interface."""

import base64
import io
import json
import math
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from reward_helpers import answering, refused

from tempflow.rewards import RewardPool, RewardSpec, build_reward
from tempflow.rewards.http.client import ServiceError

NAN = float("nan")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)


class Api:
    """What a fake server was asked, and what it answers: `reply(body)` gives a choice, or a status
    of an error."""

    def __init__(self, reply):
        self.reply, self.bodies, self.headers = reply, [], []
        self.at_once, self.most_at_once = 0, 0
        self._lock = threading.Lock()

    def chat(self, body, headers):
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.reply(body)
        finally:
            with self._lock:
                self.at_once -= 1


@contextmanager
def fake(reply, models=("judge",)):
    """(base_url, Api) of a server that answers chats with `reply`."""
    api = Api(reply if callable(reply) else lambda body: reply)

    def respond(path, headers, body):
        if path == "/v1/models":
            status, value = (
                200 if models is not None else 404,
                {"object": "list", "data": [{"id": name} for name in models or ()]},
            )
        else:
            choice = api.chat(json.loads(body), headers)
            refusal = isinstance(choice, int)
            status = choice if refusal else 200 if path == "/v1/chat/completions" else 404
            value = (
                {"error": {"message": "no\nway", "type": "fake"}}
                if refusal
                else {"choices": [choice]}
            )
        return status, {}, json.dumps(value).encode()

    with answering(respond) as url:
        yield url + "/v1", api


def says(text, finish="stop"):
    return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}


def judge(url, **options):
    return build_reward(
        "vlm_judge", {"base_url": url, "model": "judge", "wait_s": 0.0, "retries": 0, **options}
    )


def one(url, **options):
    return judge(url, **options).score(IMAGES[:1], ["a cat"], [{}])


def question(body):
    """The text and the decoded picture of a request."""
    (message,) = body["messages"]
    picture, text = message["content"]
    head, _, data = picture["image_url"]["url"].partition(",")
    assert (
        message["role"] == "user"
        and picture["type"] == "image_url"
        and head == "data:image/png;base64"
    )
    return text["text"], np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_every_picture_is_asked_about_with_its_prompt():
    prompts = ["one {highest}", 'two "quoted" \\1', "three Zoë"]

    def reply(body):
        text, _ = question(body)
        return says(
            json.dumps({"score": next(i for i, prompt in enumerate(prompts) if prompt in text)})
        )

    with fake(reply) as (url, api):
        reward = judge(
            url,
            rubric="Rate {prompt} from {lowest} to {highest}, as {JSON}.",
            lowest=-1,
            highest=3,
            extra={"seed": 4},
        )
        reward.load()
        scores = reward.score(IMAGES, prompts, [{}] * 3)
    assert scores.values.tolist() == [0.25, 0.5, 0.75]
    asked = {text: picture for text, picture in map(question, api.bodies)}
    for prompt, image in zip(prompts, IMAGES):
        assert np.array_equal(asked[f"Rate {prompt} from -1 to 3, as {{JSON}}."], image)
    for body in api.bodies:
        assert {key: body[key] for key in ("model", "temperature", "max_tokens", "seed")} == {
            "model": "judge",
            "temperature": 0,
            "max_tokens": 256,
            "seed": 4,
        }


@pytest.mark.parametrize(
    "text, pattern, value",
    [
        ('{"score": 7}', "", 0.7),
        ('\n```json\n{"reason": "blurry", "score": 2.5}\n```\n', "", 0.25),
        ('{"score": 0}', "", 0.0),
        ('{"score": 10.0}', "", 1.0),
        ('{"score": 11}', "", NAN),
        ('{"score": -1}', "", NAN),
        ('{"score": true}', "", NAN),
        ('{"score": "7"}', "", NAN),
        ('{"score": null}', "", NAN),
        ('{"score": NaN}', "", NAN),
        ('{"score": [7]}', "", NAN),
        ('{"rating": 7}', "", NAN),
        ("7", "", NAN),
        ('I rate it {"score": 7}', "", NAN),
        ('{"score": 7} or {"score": 8}', "", NAN),
        ("[" * 5000, "", NAN),
        ("", "", NAN),
        (None, "", NAN),
        ("It is fine.\nFinal Score: 3.5", r"Final Score:\s*([\d.]+)", 0.35),
        ("Final Score: 3 no, Final Score: 4", r"Final Score:\s*([\d.]+)", NAN),
        ("Score: 3", r"Final Score:\s*([\d.]+)", NAN),
        ("Final Score: .", r"Final Score:\s*([\d.]+)", NAN),
        ("Final Score: inf", r"Final Score:\s*(\w+)", NAN),
    ],
    ids=lambda value: None if value is None else str(value)[:20],
)
def test_rating_is_read_strictly(text, pattern, value):
    with fake(says(text)) as (url, _):
        scores = one(url, pattern=pattern)
    assert np.array_equal(scores.values, np.float32([value]), equal_nan=True), scores.details
    assert scores.details[0].startswith("not scored: ") == math.isnan(value)


@pytest.mark.parametrize(
    "choice",
    [
        says('{"score": 1}', "length"),
        {},
        {"message": None},
        {"message": {"content": [{"text": "7"}]}},
        "text",
        None,
    ],
    ids=repr,
)
def test_answer_of_another_shape_is_a_failed_value(choice):
    with fake(choice) as (url, _):
        for options in ({}, {"yes_no": True}):
            assert np.isnan(one(url, **options).values).all()


def first_token(**logprobs):
    entries = [
        {"token": token.replace("_", " "), "logprob": value} for token, value in logprobs.items()
    ]
    return {
        **says("Yes", "length"),
        "logprobs": {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": entries}]},
    }


@pytest.mark.parametrize(
    "choice, value",
    [
        (first_token(Yes=math.log(0.6), No=math.log(0.2)), 0.75),
        (
            first_token(Yes=math.log(0.3), _yes=math.log(0.2), YES=math.log(0.1), No=math.log(0.2)),
            0.75,
        ),
        (first_token(Yes=math.log(0.9), The=math.log(0.1)), 1.0),
        (first_token(no=math.log(0.6), Maybe=math.log(0.4)), 0.0),
        (first_token(Yes=math.log(0.2), No=math.log(0.1), The=math.log(0.7)), NAN),
        (first_token(Yes=NAN, No=math.log(0.6)), NAN),
        (first_token(), NAN),
        (says("Yes"), NAN),
    ],
)
def test_probability_of_yes(choice, value):
    with fake(choice) as (url, api):
        scores = one(url, yes_no=True)
    np.testing.assert_allclose(scores.values, [value], rtol=1e-6)
    (body,) = api.bodies
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
    assert 'show "a cat"?' in question(body)[0]


def test_busy_server_is_asked_again_and_a_refusal_is_not(monkeypatch):
    monkeypatch.setattr("tempflow.rewards.vlm_judge._BACKOFF_S", 0.01)
    busy = iter([503, 429])
    with fake(lambda body: next(busy, None) or says('{"score": 5}')) as (url, api):
        assert one(url, retries=2).values.tolist() == [0.5] and len(api.bodies) == 3
    with fake(400) as (url, api):
        scores = one(url, retries=2)
    assert (
        np.isnan(scores.values).all()
        and scores.details[0].endswith("answered 400: no way")
        and len(api.bodies) == 1
    )


def test_one_failure_leaves_the_others():
    with fake(
        lambda body: 500 if np.array_equal(question(body)[1], IMAGES[1]) else says('{"score": 10}')
    ) as (url, _):
        scores = judge(url).score(IMAGES, ["a", "b", "c"], [{}] * 3)
    assert np.array_equal(scores.values, [1, NAN, 1], equal_nan=True)


def test_requests_at_once():
    def reply(body):
        time.sleep(0.2)
        return says('{"score": 1}')

    with fake(reply) as (url, api):
        judge(url, concurrency=3).score(np.repeat(IMAGES, 3, axis=0), ["a"] * 9, [{}] * 9)
    assert api.most_at_once == 3


def test_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("TEMPFLOW_TEST_KEY", "sk-very-secret")
    with fake(401) as (url, api):
        spec = RewardSpec(
            "pretty",
            1.0,
            {"base_url": url, "model": "judge", "key_env": "TEMPFLOW_TEST_KEY"},
            "vlm_judge",
        )
        with RewardPool([spec], workers=1, retries=0) as pool:
            (scores,) = pool.gather([pool.submit(IMAGES[:1], ["a"], [{}])])
            text = f"{scores} {pool.last_error} {spec}"
    assert api.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "answered 401" in text and "secret" not in text


@pytest.mark.parametrize(
    "models, words",
    [(["a", "b"], "serves a, b, not 'judge'"), (["judge"], None), (None, None)],
)
def test_model_is_looked_for_at_the_start(models, words):
    with fake(200, models=models) as (url, _):
        if words is None:
            judge(url).load()
        else:
            with refused([words]):
                judge(url).load()


def test_server_that_is_not_there_is_told_at_the_start_and_by_a_batch():
    with fake(200) as (url, _):
        pass
    for use in (lambda: judge(url).load(), lambda: one(url)):
        with pytest.raises(ServiceError, match="models did not answer"):
            use()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"base_url": "localhost:8000/v1"}, ["base_url", "localhost:8000/v1"]),
        ({"lowest": 5, "highest": 5}, ["lowest must be below highest"]),
        ({"pattern": "("}, ["pattern", "no regular expression"]),
        ({"pattern": r"\d"}, ["pattern", "one group", "0"]),
        ({"pattern": r"(\d)", "yes_no": True}, ["pattern", "yes_no"]),
        ({"rubric": "a", "rubric_file": "b"}, ["not both"]),
        ({"rubric_file": "/nowhere/rubric.txt"}, ["rubric_file", "/nowhere/rubric.txt"]),
        ({"concurrency": 0}, ["concurrency"]),
        ({"extra": {"messages": []}}, ["extra", "messages"]),
        ({"extra": ["seed"]}, ["extra", "seed"]),
        ({"key_env": "TEMPFLOW_TEST_UNSET"}, ["key_env", "TEMPFLOW_TEST_UNSET"]),
        ({"api_key": "sk-1"}, ["api_key", "no such option"]),
    ],
)
def test_options_refused(options, words):
    with refused(words):
        build_reward(
            "vlm_judge", {"base_url": "http://127.0.0.1:1/v1", "model": "judge", **options}
        )


def test_rubric_file(tmp_path):
    (tmp_path / "rubric.txt").write_text("Is {prompt} pretty?\nRate it.", encoding="utf-8")
    with fake(says('{"score": 5}')) as (url, api):
        one(url, rubric_file=str(tmp_path / "rubric.txt"))
    assert question(api.bodies[0])[0] == "Is a cat pretty?\nRate it."
