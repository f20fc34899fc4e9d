"""What the tests of the reward server and its client share."""

import socket
import threading
import time
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import uvicorn

from tempflow.rewards import RewardSpec, build_reward
from tempflow.rewards.http.batching import Batcher
from tempflow.rewards.http.server import Limits, create_app

TOKEN = "s3cret-token"


OCR = RewardSpec("ocr", 1.0, {"detect": False})


def noise(n, height=9, width=13, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


@contextmanager
def serving(*specs, limits=Limits(), token=None, **options):  # noqa: B008
    """The address of a server in a thread of this process."""
    options = {"gpus": [""], "threads": 1, "batch": 8, "wait_s": 0.0, "timeout_s": 20.0, **options}
    with ExitStack() as stack:
        batchers = {
            spec.name: stack.enter_context(closing(Batcher(spec, **options))) for spec in specs
        }
        for batcher in batchers.values():
            batcher.wait_ready()
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(create_app(batchers, limits, token), log_level="error")
        )
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
