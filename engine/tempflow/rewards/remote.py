"""Rewards computed by a reward server (`engine/reward_server.py`, or anything that speaks `wire.py`'s messages)."""

from __future__ import annotations

import json
import os

from tempflow.errors import UserError, shown
from tempflow.rewards.protocol import Reward, locate
from tempflow.rewards.web import LONGEST_S, Service, ServiceError, checked_url, token_of, wait_for
from tempflow.rewards.wire import read_answer, write_request


class HttpReward(Reward):
    """A reward of a reward server. `url`: its address, or a list of servers that share the work; one that fails is
    passed over. `reward`: which of the server's rewards ("": its only one). `timeout_s`: for one request. `wait_s`: for
    servers that are away or busy, at the start and in every try. `token_env`: the environment variable that holds the server's token.
    """

    def __init__(self, url: str | list[str], reward: str = "", timeout_s: float = 60.0, wait_s: float = 30.0, token_env: str = ""):
        urls = [url] if isinstance(url, str) else url
        if not isinstance(urls, list) or not urls:
            raise UserError(f"url: expected an address or a list of addresses, got {shown(url)}")
        if not 0 < timeout_s <= LONGEST_S or not 0 <= wait_s <= LONGEST_S:
            given = f"{shown(timeout_s)} and {shown(wait_s)}"
            raise UserError(f"timeout_s must be above 0 and wait_s at least 0, both at most {LONGEST_S:g}, got {given}")
        token = token_of("token_env", token_env)
        self._servers = [Service(checked_url("url", each), token, timeout_s) for each in urls]
        self._reward, self._wait_s = reward, wait_s
        self._next = os.getpid()  # workers start at different servers

    def check_prompts(self, prompts, metadata):
        for prompt, entry in zip(prompts, metadata):
            try:
                json.dumps(entry, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(f"{locate(prompt, entry)} has metadata that cannot be sent to a reward server: {error}") from None

    def load(self, threads=1):
        """Refuse a server that lacks the reward or does not accept the token; that one of several answers is enough."""
        served = wait_for(lambda: self._from_any(lambda server: server.get("/rewards")), self._wait_s)
        names = list(served.get("rewards", ())) if isinstance(served, dict) else []
        if self._reward not in names if self._reward else len(names) != 1:
            asked = f"does not serve {self._reward!r}" if self._reward else "does not serve one reward alone; name it with `reward`"
            raise UserError(f"{self._servers[0].url} {asked}. It serves: {', '.join(map(str, names)) or 'nothing'}")

    def score(self, images, prompts, metadata):
        message = write_request(self._reward, images, prompts, metadata)
        answer = wait_for(lambda: self._from_any(lambda server: server.post("/score", message)), self._wait_s)
        return read_answer(answer, len(images))

    def _from_any(self, ask):
        """The answer of the next server in turn, or of the one after it where that fails; ServiceError of the last."""
        self._next += 1
        for attempt in range(len(self._servers)):
            try:
                return ask(self._servers[(self._next + attempt) % len(self._servers)])
            except ServiceError as error:
                if not error.transient or attempt == len(self._servers) - 1:
                    raise
