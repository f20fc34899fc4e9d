"""The reward server and its client: the same bits as in-process, and what each end refuses."""

import base64
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from reward_helpers import answering, refused

from tempflow.errors import UserError
from tempflow.rewards import RewardPool, RewardSpec, Scores, build_reward
from tempflow.rewards.http.batching import Batcher
from tempflow.rewards.http.client import ServiceError
from tempflow.rewards.http.protocol import encode_png, read_answer, write_answer
from tempflow.rewards.http.server import Limits, create_app

SCRIPT = Path(__file__).parents[2] / "engine/reward_server.py"
TOKEN = "s3cret-token"
OCR = RewardSpec("ocr", 1.0, {"detect": False})


def noise(n, height=9, width=13, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


@contextmanager
def serving(*specs, limits=Limits(), token=None, **options):  # noqa: B008
    """The address of a server in a thread of this process."""
    options = {"gpus": [""], "threads": 1, "batch": 8, "wait_s": 0.0, "timeout_s": 20.0, **options}
    with ExitStack() as stack:
        batchers = {spec.name: stack.enter_context(closing(Batcher(spec, **options))) for spec in specs}
        for batcher in batchers.values():
            batcher.wait_ready()
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(batchers, limits, token), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def served(name):
    return RewardSpec(name, 1.0, {}, f"served_rewards:{name}")


def client(url, reward="", **options):
    made = build_reward("http", {"url": url, "reward": reward, "wait_s": 0.0, **options})
    made.load()
    return made


def values_of(reward, entries, images=None):
    images = noise(len(entries)) if images is None else images
    return reward.score(images, [""] * len(entries), entries)


@pytest.fixture(scope="module")
def server():
    with serving(served("listed"), served("Seen"), OCR, wait_s=0.2) as url:
        yield url


# The messages.


@given(hnp.arrays(np.float32, st.integers(1, 5), elements=st.floats(allow_infinity=False, width=32)))
def test_scores_survive_the_way(values):
    sent = json.loads(json.dumps(write_answer(Scores(values, ["a"] * len(values))), allow_nan=False))
    received = read_answer(sent, len(values))
    assert np.array_equal(received.values, values, equal_nan=True) and received.values.dtype == np.float32
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
    metadata = [{"tag": "counting", "include": [{"class": "cat", "count": 2}]}, {"source": "p.jsonl:2"}, {}]
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
    assert [a.values.tolist() for a in answers] == [[entry["value"] for entry in entries] for entries in requests]
    sizes = [int(answer.details[0].split()[0]) for answer in answers]
    assert max(sizes) > 3 and max(sizes) <= 8, "more than any request's own pictures, no more than a batch"


def test_large_requests_are_split_and_sizes_are_not_mixed(server):
    reward = client(server, "listed")
    large = [{"value": i if i % 7 else None} for i in range(20)]
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(values_of, reward, [{"value": -1}], noise(1, 5, 5))
        answer = values_of(reward, large)
    assert [None if np.isnan(v) else v for v in answer.values] == [entry["value"] for entry in large]
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
    assert "500" in str(spoilt) and ("KeyError: 'bad metadata'" if fault == "bad" else "exit status 3") in str(spoilt)
    if fault == "bad":  # an exception is no reason to load the model again
        assert first.details[0].split()[-1] == values_of(reward, [{"value": 1}]).details[0].split()[-1]


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


# What the server refuses.


def post(url, body, headers={"Content-Type": "application/json"}):  # noqa: B006
    """Status and error text of a raw request to /score."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + "/score", body, headers), timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def png(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def huge_png():
    """Some hundred bytes that claim 30000 x 30000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def picture_cases():
    picture = png(noise(1)[0])
    jpeg = io.BytesIO()
    Image.fromarray(noise(1)[0]).save(jpeg, format="JPEG")
    return {
        "huge": ([huge_png()], "pixels"),
        "many": ([png(np.zeros((400, 400, 3), np.uint8))] * 7, "pixels"),
        "sizes": ([picture, png(noise(1, 4, 4)[0])], "image 1 is 4 x 4, image 0 13 x 9"),
        "cut": ([picture[: len(picture) // 2]], "image 0"),
        "grey": ([png(noise(1)[0, ..., 0])], "mode L"),
        "jpeg": ([jpeg.getvalue()], "no PNG"),
        "pickle": ([b"\x80\x04\x95\x0a\x00."], "no PNG"),
    }


@pytest.fixture(scope="module")
def strict_server():
    limits = Limits(request_bytes=200_000, request_pixels=1_000_000, memory_bytes=250_000)
    with serving(served("slow"), limits=limits, token=TOKEN) as url:
        yield url


GOOD_HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize("name", list(picture_cases()))
def test_pictures_refused(strict_server, name):
    pictures, words = picture_cases()[name]
    encoded = [base64.b64encode(data).decode() for data in pictures]
    status, error = post(strict_server, {"images": encoded, "prompts": [""] * len(encoded)}, GOOD_HEADERS)
    assert status == 400 and words in error, error


IMAGE = encode_png(noise(1)[0])


@pytest.mark.parametrize(
    "body, status, words",
    [
        (b"{", 400, "Invalid JSON"),
        (b"[]", 400, "body"),
        ({}, 400, "images"),
        ({"images": [], "prompts": []}, 400, "at least 1"),
        ({"images": [IMAGE], "prompts": []}, 400, "1 images, but 0 prompts"),
        ({"images": [IMAGE], "prompts": [""], "metadata": [{}, {}]}, 400, "1 images, but 2 metadata"),
        ({"images": [IMAGE], "prompts": [3]}, 400, "prompts.0"),
        ({"images": [IMAGE], "prompts": [""], "metadata": [[]]}, 400, "metadata.0"),
        ({"images": ["!" + IMAGE], "prompts": [""]}, 400, "image 0"),
        ({"images": [IMAGE], "prompts": [""], "reward": "orc"}, 400, "no reward 'orc'; this server serves slow"),
        ({"images": [IMAGE], "prompts": [""], "promts": [""]}, 400, "promts"),
        (b" " * 200_001, 413, "200001 bytes"),
    ],
    ids=lambda value: None if isinstance(value, (bytes, dict)) else str(value),
)
def test_messages_refused(strict_server, body, status, words):
    got, error = post(strict_server, body, GOOD_HEADERS)
    assert (got, words in error) == (status, True), error


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Content-Type": "application/json"}, 401),
        ({**GOOD_HEADERS, "Authorization": "Bearer wrong"}, 401),
        ({**GOOD_HEADERS, "Authorization": "Bearer Zoë".encode().decode("latin-1")}, 401),
        ({**GOOD_HEADERS, "Authorization": TOKEN}, 401),
        ({**GOOD_HEADERS, "Content-Type": "text/plain"}, 415),
        (GOOD_HEADERS, 200),
    ],
)
def test_headers(strict_server, headers, status):
    assert post(strict_server, {"images": [IMAGE], "prompts": [""]}, headers)[0] == status


def test_length_must_be_told(strict_server):
    request = urllib.request.Request(strict_server + "/score", iter([b"{}"]), GOOD_HEADERS)
    with pytest.raises(urllib.error.HTTPError, match="411"):
        urllib.request.urlopen(request, timeout=20)


@pytest.mark.parametrize("headers, status", [({"Content-Type": "application/json"}, 401), (GOOD_HEADERS, 413)])
def test_refusal_of_a_large_request_arrives(strict_server, headers, status):
    """An answer in the middle of sending would be lost in a broken pipe."""
    assert post(strict_server, b" " * 30_000_000, headers)[0] == status


def test_health_needs_no_token_and_the_rest_does(strict_server):
    with urllib.request.urlopen(strict_server + "/health", timeout=20) as response:
        assert json.load(response) == {"status": "ok"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(strict_server + "/rewards", timeout=20)


def test_memory_is_refused_while_another_request_holds_it(strict_server):
    half = {"images": [IMAGE], "prompts": ["x" * 130_000], "metadata": [{"seconds": 1.5}]}
    with ThreadPoolExecutor(2) as threads:
        both = threads.map(lambda _: post(strict_server, half, GOOD_HEADERS)[0], range(2))
        assert sorted(both) == [200, 503]
    assert post(strict_server, half, GOOD_HEADERS)[0] == 200


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
        ({"url": "http://a", "token_env": "TEMPFLOW_TEST_UNSET"}, ["http.token_env", "'TEMPFLOW_TEST_UNSET' is not set"]),
        ({"url": "http://a", "token": "abc"}, ["http.token", "did you mean 'token_env'"]),
        ({}, ["http.url", "no default"]),
    ],
)
def test_options_refused(options, words):
    with refused(words) as error:
        build_reward("http", options)
    assert "pw" not in str(error.value)


def test_token_comes_from_the_environment(strict_server, monkeypatch):
    monkeypatch.setenv("TEMPFLOW_TEST_TOKEN", TOKEN)
    assert values_of(client(strict_server, "slow", token_env="TEMPFLOW_TEST_TOKEN"), [{}]).values.tolist() == [1]
    with pytest.raises(ServiceError, match="401.*token"):
        client(strict_server, "slow")


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
        values_of(build_reward("http", {"url": [dead_address(), dead_address()], "wait_s": 0.0}), [{}])


def test_start_waits_for_a_server_and_refuses_another_reward(server):
    late = iter([503])
    with answering(lambda path, headers, body: (next(late, 200), {}, b'{"rewards": {"a": {}}}')) as url:
        build_reward("http", {"url": url, "wait_s": 30.0}).load()
        with pytest.raises(UserError, match="does not serve 'b'. It serves: a"):
            client(url, "b")
    with pytest.raises(UserError, match="name it with `reward`. It serves: listed, Seen, ocr"):
        client(server)
    with pytest.raises(ServiceError, match="refused"):
        client(dead_address())


@pytest.mark.parametrize("status, again", [(503, True), (500, False)])
def test_busy_server_is_waited_for_and_a_failing_one_is_not(status, again):
    """What failed may have cost a model's run; the pool decides about another."""
    statuses, asked = iter([status]), []
    respond = lambda path, headers, body: asked.append(path) or (next(statuses, 200), {}, b'{"scores": [7]}')  # noqa: E731
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
    with answering(lambda path, headers, body: seen.append(headers) or (200, {}, b'{"scores": [1]}')) as elsewhere:
        with answering(lambda path, headers, body: (302, {"Location": elsewhere + "/score"}, b"")) as url:
            with pytest.raises(ServiceError, match="302"):
                values_of(build_reward("http", {"url": url, "token_env": "TEMPFLOW_TEST_TOKEN"}), [{}])
    assert not seen


def test_metadata_that_cannot_travel_is_named():
    reward = build_reward("http", {"url": "http://127.0.0.1:1"})
    reward.check_prompts(["a"], [{"include": [{"class": "cat", "count": 1}], "exclude": None}])
    with pytest.raises(UserError, match="p.jsonl:2: prompt 'b' has metadata"):
        reward.check_prompts(["a", "b"], [{}, {"source": "p.jsonl:2", "box": float("nan")}])


# The command.


def run_script(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TEMPFLOW_TEST_TOKEN": TOKEN}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--reward", "jpeg", "--host", "0.0.0.0"], ["--host 0.0.0.0", "--token-env"]),
        (['--reward=pickscore={"device": "cuda"}'], ["--gpus", "pickscore"]),
        (["--reward", "orc"], ["did you mean 'ocr'"]),
        (['--reward=ocr={"detct": false}'], ["did you mean 'detect'"]),
    ],
)
def test_command_refuses(arguments, words):
    process = run_script(*arguments)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.startswith("error: ") and len(error.splitlines()) == 1, error
    assert all(word in error for word in words), error


def test_command_serves_and_finishes_what_it_serves(tmp_path):
    slow = '--reward=slow={"type": "served_rewards:slow"}'
    process = run_script(slow, "--host", "0.0.0.0", "--port", "0", "--token-env", "TEMPFLOW_TEST_TOKEN")
    try:
        line = process.stdout.readline()
        assert line.startswith("serving slow at http://0.0.0.0:"), line + process.stderr.read()
        url = line.split()[-1].replace("0.0.0.0", "127.0.0.1")
        message = {"images": [IMAGE], "prompts": [""], "metadata": [{"seconds": 1.0, "begun": str(tmp_path / "begun")}]}
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(post, url, message, GOOD_HEADERS)
            while not (tmp_path / "begun").exists():
                assert not answer.done(), answer.result()
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert answer.result() == (200, {"scores": [1.0], "details": None})
        output, error = process.communicate(timeout=30)
        assert (process.returncode, error) == (0, "") and "1 pictures in 1 batches, 0 failed" in output
    finally:
        process.kill()
