"""The reward server and its client: the same bits as in-process, and what each end refuses."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reward_helpers import answering, refused
from server_cases import OCR, TOKEN, client, noise, served, serving, values_of

from tempflow.errors import UserError
from tempflow.rewards import RewardPool, RewardSpec, Scores, build_reward
from tempflow.rewards.http.client import ServiceError
from tempflow.rewards.http.protocol import read_answer, write_answer
from tempflow.rewards.http.server import Limits


@pytest.fixture(scope="module")
def server():
    with serving(served("listed"), served("Seen"), OCR, wait_s=0.2) as url:
        yield url


# The messages.


@given(
    hnp.arrays(np.float32, st.integers(1, 5), elements=st.floats(allow_infinity=False, width=32))
)
def test_scores_survive_the_way(values):
    sent = json.loads(
        json.dumps(write_answer(Scores(values, ["a"] * len(values))), allow_nan=False)
    )
    received = read_answer(sent, len(values))
    assert (
        np.array_equal(received.values, values, equal_nan=True)
        and received.values.dtype == np.float32
    )
    assert received.details == ["a"] * len(values)


@pytest.mark.parametrize(
    "answer",
    [
        b"[1, 2]",
        b"{}",
        b'{"scores": 1}',
        b'{"scores": [1]}',
        b'{"scores": [1, 2, 3]}',
        b'{"scores": [1, "2"]}',
        b'{"scores": [1, true]}',
        b'{"scores": [1, NaN]}',
        b'{"scores": [1, 1e39]}',
        b'{"scores": [1, [2]]}',
        b'{"scores": [1, 2], "details": ["a"]}',
        b'{"scores": [1, 2], "details": [1, 2]}',
        b"<html>",
        b"",
        b"\x80\x04K\x01.",
    ],
    ids=repr,
)
def test_nonsense_is_an_error_and_no_score(answer):
    with answering(lambda path, headers, body: (200, {}, answer)) as url:
        with pytest.raises((ServiceError, ValueError)):
            values_of(build_reward("http", {"url": url}), [{}, {}])


# Both ends together.


def test_what_arrives_is_what_was_sent(server):
    images, prompts = noise(3), ['a "quoted" Zoë', "", "b\nc"]
    metadata = [
        {"tag": "counting", "include": [{"class": "cat", "count": 2}]},
        {"source": "p.jsonl:2"},
        {},
    ]
    here = build_reward("served_rewards:Seen").score(images, prompts, metadata)
    there = client(server, "Seen").score(images, prompts, metadata)
    assert there.details == here.details
    assert np.array_equal(there.values, here.values.astype(np.float32))


def test_ocr_through_pool_and_server_is_the_pool_alone(server):
    images, prompts = noise(5, 32, 96), ['the word "A"'] * 4 + ["no word"]
    remote = RewardSpec("remote", 1.0, {"url": server, "reward": "ocr"}, "http")
    with RewardPool([remote, OCR], workers=1) as pool:
        (scores,) = pool.gather([pool.submit(images, prompts, [{}] * 5)])
    assert np.array_equal(scores["remote"].values, scores["ocr"].values, equal_nan=True)
    assert np.isnan(scores["remote"].values).tolist() == [False] * 4 + [True]
    assert scores["remote"].details == scores["ocr"].details


def test_requests_share_batches_and_get_their_own_scores(server):
    reward = client(server, "listed")
    requests = [[{"value": 10 * i + j} for j in range(1 + i % 3)] for i in range(12)]
    together = threading.Barrier(12)

    def ask(entries):
        together.wait()
        return values_of(reward, entries)

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, requests))
    assert [a.values.tolist() for a in answers] == [
        [entry["value"] for entry in entries] for entries in requests
    ]
    sizes = [int(answer.details[0].split()[0]) for answer in answers]
    assert max(sizes) > 3 and max(sizes) <= 8, (
        "more than any request's own pictures, no more than a batch"
    )


def test_large_requests_are_split_and_sizes_are_not_mixed(server):
    reward = client(server, "listed")
    large = [{"value": i if i % 7 else None} for i in range(20)]
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(values_of, reward, [{"value": -1}], noise(1, 5, 5))
        answer = values_of(reward, large)
    assert [None if np.isnan(v) else v for v in answer.values] == [
        entry["value"] for entry in large
    ]
    assert [text.split()[0] for text in answer.details] == ["8"] * 16 + ["4"] * 4
    assert other.result().details[0].startswith("1 ")


@pytest.mark.parametrize("fault", ["bad", "fatal"])
def test_one_request_does_not_spoil_another(server, fault):
    reward = client(server, "listed")
    requests = [[{"value": 1}], [{"value": 2, fault: True}], [{"value": 3}, {"value": 4}]]

    def ask(entries):
        try:
            return values_of(reward, entries)
        except ServiceError as error:
            return error

    with ThreadPoolExecutor(3) as threads:
        first, spoilt, last = threads.map(ask, requests)
    assert first.values.tolist() == [1] and last.values.tolist() == [3, 4]
    assert "500" in str(spoilt) and (
        "KeyError: 'bad metadata'" if fault == "bad" else "exit status 3"
    ) in str(spoilt)
    if fault == "bad":  # an exception is no reason to load the model again
        assert (
            first.details[0].split()[-1] == values_of(reward, [{"value": 1}]).details[0].split()[-1]
        )


def test_hanging_worker_is_an_error_in_time_and_replaced():
    with serving(served("slow"), limits=Limits(timeout_s=0.7), timeout_s=1.0) as url:
        started = time.monotonic()
        with pytest.raises(ServiceError, match="504.*0.7 s"):
            values_of(client(url), [{"seconds": 600}])
        assert time.monotonic() - started < 5
        deadline, values = time.monotonic() + 30, None
        while values is None and time.monotonic() < deadline:
            try:
                values = values_of(client(url), [{}]).values.tolist()
            except ServiceError as error:
                assert error.transient
        assert values == [1]


# The client.


@pytest.mark.parametrize(
    "options, words",
    [
        ({"url": "127.0.0.1:8600"}, ["http.url", "http://127.0.0.1:8600"]),
        ({"url": "file:///etc/passwd"}, ["http.url", "file:"]),
        ({"url": "http://me:pw@host"}, ["no user name or password"]),
        ({"url": "http://host:99999"}, ["http.url"]),
        ({"url": []}, ["http.url", "list"]),
        ({"url": ["http://a", 3]}, ["http.url", "3"]),
        ({"url": "http://a", "timeout_s": 0}, ["timeout_s"]),
        ({"url": "http://a", "timeout_s": 1e300}, ["timeout_s", "at most 1e+06"]),
        ({"url": "http://a", "wait_s": float("nan")}, ["wait_s", "expected a number, got nan"]),
        (
            {"url": "http://a", "token_env": "TEMPFLOW_TEST_UNSET"},
            ["http.token_env", "'TEMPFLOW_TEST_UNSET' is not set"],
        ),
        ({"url": "http://a", "token": "abc"}, ["http.token", "did you mean 'token_env'"]),
        ({}, ["http.url", "no default"]),
    ],
)
def test_options_refused(options, words):
    with refused(words) as error:
        build_reward("http", options)
    assert "pw" not in str(error.value)


def dead_address():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_servers_share_the_work_and_stand_in_for_each_other(server):
    asked = []

    def respond(path, headers, body):
        asked.append(path)
        return 200, {}, b'{"scores": [7]}' if path == "/score" else b'{"rewards": {"listed": {}}}'

    with answering(respond) as other:
        reward = client([server, dead_address(), other], "listed")
        asked.clear()
        values = [values_of(reward, [{"value": 1}]).values[0] for _ in range(6)]
    assert sorted(values) == [1, 1, 7, 7, 7, 7], "the dead server's turns go to the next"
    with pytest.raises(ServiceError, match="did not answer"):
        values_of(
            build_reward("http", {"url": [dead_address(), dead_address()], "wait_s": 0.0}), [{}]
        )


def test_start_waits_for_a_server_and_refuses_another_reward(server):
    late = iter([503])
    with answering(
        lambda path, headers, body: (next(late, 200), {}, b'{"rewards": {"a": {}}}')
    ) as url:
        build_reward("http", {"url": url, "wait_s": 30.0}).load()
        with pytest.raises(UserError, match="does not serve 'b'. It serves: a"):
            client(url, "b")
    with pytest.raises(
        UserError, match="choose one with the option `reward`. It serves: listed, Seen, ocr"
    ):
        client(server)
    with pytest.raises(ServiceError, match="refused"):
        client(dead_address())


@pytest.mark.parametrize("status, again", [(503, True), (500, False)])
def test_busy_server_is_waited_for_and_a_failing_one_is_not(status, again):
    """What failed may have cost a model's run; the pool decides about another."""
    statuses, asked = iter([status]), []

    def respond(path, headers, body):
        asked.append(path)
        return next(statuses, 200), {}, b'{"scores": [7]}'

    with answering(respond) as url:
        reward = build_reward("http", {"url": url, "wait_s": 20.0})
        if again:
            assert values_of(reward, [{}]).values.tolist() == [7] and len(asked) == 2
        else:
            with pytest.raises(ServiceError, match="answered 500"):
                values_of(reward, [{}])
            assert len(asked) == 1


def test_redirect_does_not_carry_the_token_away(monkeypatch):
    monkeypatch.setenv("TEMPFLOW_TEST_TOKEN", TOKEN)
    seen = []
    with answering(
        lambda path, headers, body: seen.append(headers) or (200, {}, b'{"scores": [1]}')
    ) as elsewhere:
        with answering(
            lambda path, headers, body: (302, {"Location": elsewhere + "/score"}, b"")
        ) as url:
            with pytest.raises(ServiceError, match="302"):
                values_of(
                    build_reward("http", {"url": url, "token_env": "TEMPFLOW_TEST_TOKEN"}), [{}]
                )
    assert not seen


def test_metadata_that_cannot_travel_is_named():
    reward = build_reward("http", {"url": "http://127.0.0.1:1"})
    reward.check_prompts(["a"], [{"include": [{"class": "cat", "count": 1}], "exclude": None}])
    with pytest.raises(UserError, match="p.jsonl:2: prompt 'b' has metadata"):
        reward.check_prompts(["a", "b"], [{}, {"source": "p.jsonl:2", "box": float("nan")}])
