"""What the reward server refuses, and its command."""

import base64
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from server_cases import TOKEN, client, noise, served, serving, values_of

from tempflow.rewards.http.client import ServiceError
from tempflow.rewards.http.protocol import encode_png
from tempflow.rewards.http.server import Limits

SCRIPT = Path(__file__).parents[2] / "engine/reward_server.py"


def post(url, body, headers={"Content-Type": "application/json"}):  # noqa: B006
    """Status and error text of a raw request to /score."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url + "/score", body, headers), timeout=20
        ) as response:
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
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def picture_cases():
    picture = png(noise(1)[0])
    jpeg = io.BytesIO()
    Image.fromarray(noise(1)[0]).save(jpeg, format="JPEG")
    return {
        "huge": ([huge_png()], "pixels"),
        "many": ([png(np.zeros((400, 400, 3), np.uint8))] * 7, "pixels"),
        "sizes": ([picture, png(noise(1, 4, 4)[0])], "image 1 is 4 x 4, image 0 is 13 x 9"),
        "cut": ([picture[: len(picture) // 2]], "image 0"),
        "grey": ([png(noise(1)[0, ..., 0])], "mode L"),
        "jpeg": ([jpeg.getvalue()], "not a PNG"),
        "pickle": ([b"\x80\x04\x95\x0a\x00."], "not a PNG"),
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
    status, error = post(
        strict_server, {"images": encoded, "prompts": [""] * len(encoded)}, GOOD_HEADERS
    )
    assert status == 400 and words in error, error


IMAGE = encode_png(noise(1)[0])


@pytest.mark.parametrize(
    "body, status, words",
    [
        (b"{", 400, "Invalid JSON"),
        (b"[]", 400, "body"),
        ({}, 400, "images"),
        ({"images": [], "prompts": []}, 400, "at least 1"),
        ({"images": [IMAGE], "prompts": []}, 400, "1 image, but 0 prompts"),
        (
            {"images": [IMAGE], "prompts": [""], "metadata": [{}, {}]},
            400,
            "1 image, but 2 metadata",
        ),
        ({"images": [IMAGE], "prompts": [3]}, 400, "prompts.0"),
        ({"images": [IMAGE], "prompts": [""], "metadata": [[]]}, 400, "metadata.0"),
        ({"images": ["!" + IMAGE], "prompts": [""]}, 400, "image 0"),
        (
            {"images": [IMAGE], "prompts": [""], "reward": "orc"},
            400,
            "no reward 'orc'; this server serves slow",
        ),
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


@pytest.mark.parametrize(
    "headers, status", [({"Content-Type": "application/json"}, 401), (GOOD_HEADERS, 413)]
)
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


def test_token_comes_from_the_environment(strict_server, monkeypatch):
    monkeypatch.setenv("TEMPFLOW_TEST_TOKEN", TOKEN)
    assert values_of(
        client(strict_server, "slow", token_env="TEMPFLOW_TEST_TOKEN"), [{}]
    ).values.tolist() == [1]
    with pytest.raises(ServiceError, match="401.*token"):
        client(strict_server, "slow")


def run_script(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "TEMPFLOW_TEST_TOKEN": TOKEN,
    }
    return subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


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
    assert (
        process.returncode == 2 and error.startswith("error: ") and len(error.splitlines()) == 1
    ), error
    assert all(word in error for word in words), error


def test_command_serves_and_finishes_what_it_serves(tmp_path):
    slow = '--reward=slow={"type": "served_rewards:slow"}'
    process = run_script(
        slow, "--host", "0.0.0.0", "--port", "0", "--token-env", "TEMPFLOW_TEST_TOKEN"
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving slow at http://0.0.0.0:"), line + process.stderr.read()
        url = line.split()[-1].replace("0.0.0.0", "127.0.0.1")
        message = {
            "images": [IMAGE],
            "prompts": [""],
            "metadata": [{"seconds": 1.0, "begun": str(tmp_path / "begun")}],
        }
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(post, url, message, GOOD_HEADERS)
            while not (tmp_path / "begun").exists():
                assert not answer.done(), answer.result()
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert answer.result() == (200, {"scores": [1.0], "details": None})
        output, error = process.communicate(timeout=30)
        assert (process.returncode, error) == (
            0,
            "",
        ) and "1 image in 1 batch, 0 failed" in output
    finally:
        process.kill()
