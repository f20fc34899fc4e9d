"""Rewards that are computed elsewhere: `Service`, JSON over HTTP with checked answers and errors
that say who failed how, and `HttpReward`, the reward of a reward server (`engine/reward_server.py`,
or anything that speaks `protocol.py`'s messages).

The standard library's client will do: a request carries megabytes and is answered after a model has
run, so keeping connections open gains nothing. Redirects are refused, for they would carry the
token to another host. Proxies are the environment's (`https_proxy`, `no_proxy`). Tokens come from
environment variables, never from the config, which is copied into run directories.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request

from tempflow.errors import UserError, shown
from tempflow.rewards.base import Reward, Scores, joined, locate
from tempflow.rewards.http.protocol import read_answer, sendable, write_request

# of a request at most, which a server allows by default: as noise they are 256 MB, PNG in base64
PIXELS = 64_000_000
ANSWER_LIMIT = 16 << 20  # bytes; an answer is some numbers and short texts
LONGEST_S = 1e6  # of a timeout; sockets refuse those of more than 292 years
_LATER = {408, 425, 429, 500, 502, 503, 504}
_AWAY = {None, 429, 502, 503}  # nobody there, starting, or too busy to look at the request


class ServiceError(Exception):
    """A request failed. `transient`: the same request may succeed later, or at another server.

    status: of the HTTP answer, or None where there was none.
    """

    def __init__(self, message: str, *, transient: bool, status: int | None = None):
        super().__init__(message)
        self.transient = transient
        self.status = status


class Service:
    """One server: `url` checked by `checked_url`, `token` sent with every request unless None."""

    def __init__(self, url: str, token: str | None, timeout_s: float):
        self.url = url
        self._headers = {"Accept": "application/json"} | (
            {"Authorization": f"Bearer {token}"} if token else {}
        )
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(_NoRedirect)

    def get(self, path: str):
        """The JSON value at `path`. Raises ServiceError."""
        return self._exchange(urllib.request.Request(self.url + path, headers=self._headers))

    def post(self, path: str, message: dict):
        """The JSON value answered to a JSON message. Raises ServiceError, ValueError for a message
        that JSON cannot hold."""
        body = json.dumps(message, allow_nan=False).encode()
        headers = self._headers | {"Content-Type": "application/json"}
        return self._exchange(
            urllib.request.Request(self.url + path, data=body, headers=headers, method="POST")
        )

    def _exchange(self, request: urllib.request.Request):
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                text = response.read(ANSWER_LIMIT + 1)
        except urllib.error.HTTPError as error:
            reason = _reason(error)
            raise ServiceError(
                f"{request.full_url} answered {error.code}: {reason}",
                transient=error.code in _LATER,
                status=error.code,
            ) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            words = (
                f"within {self._timeout_s:g} s"
                if isinstance(cause, TimeoutError)
                else f"({cause or type(cause).__name__})"
            )
            raise ServiceError(
                f"{request.full_url} did not answer {words}", transient=True
            ) from None
        if len(text) > ANSWER_LIMIT:
            raise ServiceError(
                f"{request.full_url} answered more than {ANSWER_LIMIT} bytes", transient=False
            )
        try:
            return json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ServiceError(
                f"{request.full_url} answered no JSON ({error}): {shown(text)}", transient=False
            ) from None


class HttpReward(Reward):
    """A reward of a reward server. `url`: its address, or a list of servers that share the work;
    one that fails is passed over. `reward`: which of the server's rewards ("": its only one).
    `timeout_s`: for one request. `wait_s`: for servers that are away or busy, at the start and in
    every try. `token_env`: the environment variable that holds the server's token.
    `videos`: the server's reward scores whole videos."""

    def __init__(
        self,
        url: str | list[str],
        reward: str = "",
        timeout_s: float = 60.0,
        wait_s: float = 30.0,
        token_env: str = "",
        videos: bool = False,
    ):
        urls = [url] if isinstance(url, str) else url
        if not isinstance(urls, list) or not urls:
            raise UserError(f"url: expected an address or a list of addresses, got {shown(url)}")
        if not 0 < timeout_s <= LONGEST_S or not 0 <= wait_s <= LONGEST_S:
            given = f"{shown(timeout_s)} and {shown(wait_s)}"
            raise UserError(
                f"timeout_s must be above 0 and wait_s at least 0, both at most {LONGEST_S:g}, got"
                f" {given}"
            )
        token = token_of("token_env", token_env)
        self._servers = [Service(checked_url("url", each), token, timeout_s) for each in urls]
        self._reward, self._wait_s, self.takes_videos = reward, wait_s, videos
        self._next = os.getpid()  # workers start at different servers

    def check_prompts(self, prompts, metadata):
        for prompt, entry in zip(prompts, metadata):
            try:
                json.dumps(sendable(entry), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{locate(prompt, entry)} has metadata that cannot be sent to a reward server:"
                    f" {error}"
                ) from None

    def load(self, threads=1):
        """Refuse a server that lacks the reward or does not accept the token; that one of several
        answers is enough."""
        served = wait_for(
            lambda: self._from_any(lambda server: server.get("/rewards")), self._wait_s
        )
        names = list(served.get("rewards", ())) if isinstance(served, dict) else []
        if self._reward not in names if self._reward else len(names) != 1:
            asked = (
                f"does not serve {self._reward!r}"
                if self._reward
                else "does not serve one reward alone; name it with `reward`"
            )
            raise UserError(
                f"{self._servers[0].url} {asked}. It serves:"
                f" {', '.join(map(str, names)) or 'nothing'}"
            )

    def score(self, images, prompts, metadata):
        each = max(1, PIXELS // max(1, images[0].size // 3)) if len(images) else 1
        parts = [slice(first, first + each) for first in range(0, len(images), each)] or [slice(0)]
        return joined([self._ask(images[part], prompts[part], metadata[part]) for part in parts])

    def _ask(self, images, prompts, metadata) -> Scores:
        """Scores of as many images or videos as a request holds."""
        message = write_request(self._reward, images, prompts, metadata)
        answer = wait_for(
            lambda: self._from_any(lambda server: server.post("/score", message)), self._wait_s
        )
        return read_answer(answer, len(images))

    def _from_any(self, ask):
        """The answer of the next server in turn, or of the one after it where that fails;
        ServiceError of the last."""
        self._next += 1
        for attempt in range(len(self._servers)):
            try:
                return ask(self._servers[(self._next + attempt) % len(self._servers)])
            except ServiceError as error:
                if not error.transient or attempt == len(self._servers) - 1:
                    raise


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None  # ends as an HTTPError with the redirect's status


def checked_url(key: str, url) -> str:
    """`url` without a slash at its end; UserError unless it is http(s)://host..., without a
    password, query or fragment."""
    try:
        parts = urllib.parse.urlsplit(url if isinstance(url, str) else "")
        usable = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and not parts.query
            and not parts.fragment
        )
        usable = (
            usable
            and (parts.port is None or parts.port > 0)
            and url.isprintable()
            and " " not in url
        )
    except ValueError:
        usable = False
    if usable and "@" in parts.netloc:  # type: ignore[possibly-undefined]  # bound where the URL is usable
        raise UserError(
            f"{key}: no user name or password in the address; name an environment variable that"
            " holds a token instead"
        )
    if not usable:
        raise UserError(
            f'{key}: expected an address such as "http://127.0.0.1:8600", got {shown(url)}'
        )
    return url.rstrip("/")


def token_of(key: str, variable: str) -> str | None:
    """The token in an environment variable; None where `variable` is "". UserError where it is
    unset, empty or no token."""
    if not variable:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            f"{key}: the environment variable {variable!r} is not set; it must hold the token"
        )
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(
            f"{key}: the environment variable {variable!r} holds characters that a token cannot"
            " have"
        )
    return token


def wait_for(ask, wait_s: float):
    """What `ask()` returns, asked again for `wait_s` seconds while a ServiceError says that the
    server is away or busy. Raises the last one. A request that was answered with another error is
    not repeated here: each may cost the server a model's run."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return ask()
        except ServiceError as error:
            if not error.transient or error.status not in _AWAY or time.monotonic() >= deadline:
                raise
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def _reason(error: urllib.error.HTTPError) -> str:
    """What an error's body says, in the forms of our server and of OpenAI's interface, or its first
    words."""
    try:
        text = error.read(4000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        body = json.loads(text)
        said = body.get("error", body.get("message", body.get("detail")))
        said = said.get("message") if isinstance(said, dict) else said
        if isinstance(said, str):
            text = said
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(text.split())[:500] or str(error.reason)


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")
