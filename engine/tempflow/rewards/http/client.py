"""Rewards that are computed on other machines: `Service` exchanges JSON over HTTP, and `HttpReward`
asks a reward server (`engine/reward_server.py`, or any program that speaks `protocol.py`'s
messages).

The standard library's client is used. A request carries megabytes and is answered after a model has
run, so keeping connections open would gain nothing. Redirects are refused, because they would carry
the token to another host. Proxies are taken from the environment (`https_proxy`, `no_proxy`).
Tokens come from environment variables and never from the config, which is copied into run
directories.
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

# The most pixels of a request. As PNG in base64, images of noise would then take 256 MB, a server's
# default limit.
PIXELS = 64_000_000
ANSWER_LIMIT = 16 << 20  # bytes; an answer holds some numbers and short texts
LONGEST_S = 1e6  # of any timeout; sockets raise OverflowError for more than 292 years
_LATER = {408, 425, 429, 500, 502, 503, 504}  # the same request may succeed later
# Of those, the ones that cost the server nothing: no answer, starting, or too busy to read it.
_AWAY = {None, 429, 502, 503}


class ServiceError(Exception):
    """A request failed.

    Args:
        message: names the address and says what happened.
        transient: whether the same request may succeed later, or at another server.
        status: the HTTP status of the answer; None: there was no answer.
    """

    def __init__(self, message: str, *, transient: bool, status: int | None = None):
        super().__init__(message)
        self.transient = transient
        self.status = status


class Service:
    """One server that exchanges JSON.

    Args:
        url: its address, as `checked_url` returns it.
        token: sent with every request as a bearer token; None: no token.
        timeout_s: seconds for one request.
    """

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
        """The JSON value that answers a JSON message. Raises ServiceError, and ValueError for a
        message that JSON cannot represent, such as NaN."""
        body = json.dumps(message, allow_nan=False).encode()
        headers = self._headers | {"Content-Type": "application/json"}
        return self._exchange(
            urllib.request.Request(self.url + path, data=body, headers=headers, method="POST")
        )

    def _exchange(self, request: urllib.request.Request):
        """Send a request and parse the answer. Every way to fail becomes a ServiceError."""
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                text = response.read(ANSWER_LIMIT + 1)  # one more byte tells that it is too long
        except urllib.error.HTTPError as error:
            reason = _reason(error)
            raise ServiceError(
                f"{request.full_url} answered {error.code}: {reason}",
                transient=error.code in _LATER,
                status=error.code,
            ) from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)  # urllib wraps the socket's exception
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
                f"{request.full_url} did not answer with JSON ({error}): {shown(text)}",
                transient=False,
            ) from None


class HttpReward(Reward):
    """A reward that a reward server computes.

    Args:
        url: address of the server, or a list of servers that share the work; if one fails, the next
            one is asked.
        reward: which of the server's rewards; "": its only one.
        timeout_s: seconds for one request.
        wait_s: seconds to wait for servers that are not reachable or busy, at the start and at
            every try.
        token_env: environment variable that holds the server's token; "": no token.
        videos: whether the server's reward scores whole videos.
    """

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
        self._next = os.getpid()  # differs between workers, so they begin with different servers

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
        """Refuse a server that lacks the reward or does not accept the token. Of several servers,
        the first one that answers is checked."""
        served = wait_for(
            lambda: self._from_any(lambda server: server.get("/rewards")), self._wait_s
        )
        names = list(served.get("rewards", ())) if isinstance(served, dict) else []
        if self._reward not in names if self._reward else len(names) != 1:
            asked = (
                f"does not serve {self._reward!r}"
                if self._reward
                else "does not serve exactly one reward; choose one with the option `reward`"
            )
            raise UserError(
                f"{self._servers[0].url} {asked}. It serves:"
                f" {', '.join(map(str, names)) or 'nothing'}"
            )

    def score(self, images, prompts, metadata):
        # Images or videos per request; `size // 3` is the number of pixels of one.
        each = max(1, PIXELS // max(1, images[0].size // 3)) if len(images) else 1
        parts = [slice(first, first + each) for first in range(0, len(images), each)] or [slice(0)]
        return joined([self._ask(images[part], prompts[part], metadata[part]) for part in parts])

    def _ask(self, images, prompts, metadata) -> Scores:
        """Scores of the images or videos of one request."""
        message = write_request(self._reward, images, prompts, metadata)
        answer = wait_for(
            lambda: self._from_any(lambda server: server.post("/score", message)), self._wait_s
        )
        return read_answer(answer, len(images))

    def _from_any(self, ask):
        """The answer of the next server in turn. If it fails with an error that may be its own, the
        servers after it are asked; the last one's ServiceError is raised."""
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
    """Check the address of a server.

    Args:
        key: the option, for error messages.
        url: what the config gives.

    Returns:
        The address without a slash at its end.

    Raises:
        UserError: unless it is http(s)://host..., without a user name, password, query or fragment.
    """
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
            and (parts.port is None or parts.port > 0)  # `port` raises ValueError above 65535
            and url.isprintable()
            and " " not in url
        )
        named = "@" in parts.netloc
    except ValueError:
        usable = named = False
    if usable and named:
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
    """The token in an environment variable; None if `variable` is "". UserError, beginning with
    `key`, if the variable is not set, is empty or does not hold a token."""
    if not variable:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            f"{key}: the environment variable {variable!r} is not set; it must hold the token"
        )
    # Other characters would end the header, or raise an error that quotes the token.
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(
            f"{key}: the environment variable {variable!r} must hold printable ASCII characters"
            " without spaces, and it holds others"
        )
    return token


def wait_for(ask, wait_s: float):
    """Call `ask`, and repeat it for `wait_s` seconds while its ServiceError says that the server is
    not reachable or busy; then raise the last one. Other errors are not repeated here, because each
    request may cost the server a run of its model."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return ask()
        except ServiceError as error:
            if not error.transient or error.status not in _AWAY or time.monotonic() >= deadline:
                raise
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def _reason(error: urllib.error.HTTPError) -> str:
    """The message in an error's body, in the forms of our server, of FastAPI and of OpenAI's
    interface; otherwise the beginning of the body."""
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
    """For json.loads, which would accept NaN and Infinity."""
    raise ValueError(f"{name} is not JSON")
