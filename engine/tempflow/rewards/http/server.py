"""The web application of the reward server: it checks requests, limits them, and answers with
scores. `protocol.py` describes the messages.

Memory is limited before it is allocated: a request must declare its length, and is refused with 503
while the requests being served fill `Limits.memory_bytes`; image sizes are checked before images
are decoded. Nothing is written to disk.
"""

from __future__ import annotations

import asyncio
import hmac
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from tempflow.errors import counted
from tempflow.rewards.base import joined
from tempflow.rewards.conditions import KEY
from tempflow.rewards.http.batching import Batcher, ScoringFailed
from tempflow.rewards.http.protocol import (
    as_media,
    decode,
    decoded_bytes,
    open_images,
    write_answer,
)


@dataclass(frozen=True)
class Limits:
    """Limits of the server."""

    request_bytes: int = 256 << 20
    """Bytes of a request's body."""
    request_pixels: int = 128_000_000
    """Pixels of a request's images together."""
    memory_bytes: int = 4 << 30
    """Bytes of the bodies and decoded images of all requests that are being served."""
    timeout_s: float = 60.0
    """Seconds from a request's arrival to its answer."""


class ScoreRequest(BaseModel):
    """The body of POST /score; `protocol.py` describes the fields."""

    # strict: 1.0 is not taken for frames 1, nor "1" for 1
    model_config = ConfigDict(extra="forbid", strict=True)

    reward: str = ""
    images: list[str] = Field(min_length=1)
    prompts: list[str]
    metadata: list[dict] | None = None
    frames: int | None = Field(None, ge=1)
    conditions: list[str] = []
    conditions_of: list[list[int]] | None = None


class _Memory:
    """Counts the bytes of all requests that are being served. Without a lock, because only the
    event loop's thread uses it."""

    def __init__(self, limit: int):
        self._free = limit

    @contextmanager
    def hold(self, size: int):
        """Count `size` bytes for the duration of a `with` block; 503 if they are too many now."""
        if size > self._free:
            raise HTTPException(
                503,
                "too much is being served already; try again later",
                headers={"Retry-After": "1"},
            )
        self._free -= size
        try:
            yield
        finally:
            self._free += size


def create_app(batchers: dict[str, Batcher], limits: Limits, token: str | None) -> FastAPI:
    """Make the web application.

    Args:
        batchers: the rewards to serve, by name.
        limits: what a request may take.
        token: the bearer token that every page but /health requires; None: no token.
    """
    app = FastAPI(
        title="TempFlow-GRPO reward server", docs_url=None, redoc_url=None, openapi_url=None
    )
    memory = _Memory(limits.memory_bytes)

    # Starlette's class, of which FastAPI's is a subclass: unknown paths raise the former.
    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = all(batcher.healthy for batcher in batchers.values())
        return JSONResponse({"status": "ok" if healthy else "failing"}, 200 if healthy else 503)

    @app.get("/rewards")
    async def rewards(request: Request) -> dict:
        _authorise(request, token)
        return {"rewards": {name: batcher.counts() for name, batcher in batchers.items()}}

    @app.post("/score")
    async def score(request: Request) -> dict:
        with ExitStack() as held:
            try:
                # Before the body is read: a client without the token fills no memory.
                _authorise(request, token)
                held.enter_context(memory.hold(_body_length(request, limits.request_bytes)))
            except HTTPException:
                await _discard(request, limits.timeout_s)
                raise
            try:
                return await asyncio.wait_for(answer(request), limits.timeout_s)
            except asyncio.TimeoutError:  # noqa: UP041 (not the built-in one in Python 3.10)
                raise HTTPException(504, f"not scored within {limits.timeout_s:g} s") from None
            except ClientDisconnect:
                raise HTTPException(
                    400, "the connection ended before the whole request came"
                ) from None

    async def answer(request: Request) -> dict:
        body = await request.body()
        try:
            # Parsing and decoding run in threads, so that the server answers others meanwhile.
            asked = await run_in_threadpool(_read, body)
            batcher = _chosen(batchers, asked.reward)
            if asked.frames is not None and not batcher.takes_videos:
                raise ValueError(
                    f"reward {batcher.name!r} scores images, but the request has videos; its entry"
                    ' in the config needs "frames": 4 instead of "videos": true'
                )
            opened, conditions = await run_in_threadpool(_open, asked, limits.request_pixels)
            # Beyond the body, which is counted already and held until the answer is sent.
            with memory.hold(decoded_bytes(opened) + decoded_bytes(conditions)):
                images = as_media(await run_in_threadpool(decode, opened), asked.frames)
                metadata = _metadata(
                    asked, await run_in_threadpool(decode, conditions, "condition")
                )
                futures = batcher.submit(images, asked.prompts, metadata)
                # If the timeout above cancels this, the futures are cancelled too.
                parts = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except ScoringFailed as error:
            raise HTTPException(500, str(error)) from None
        return write_answer(joined(parts))

    return app


def _authorise(request: Request, token: str | None) -> None:
    """401 unless the request has the token. The comparison takes the same time for every wrong
    token, so that the time does not reveal how many characters are right."""
    sent = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
        raise HTTPException(
            401, "this server needs its bearer token", headers={"WWW-Authenticate": "Bearer"}
        )


def _body_length(request: Request, most: int) -> int:
    """The declared length of the body in bytes; the web server reads no more than that. Raises 415,
    411 or 413."""
    # A page in a browser on this machine could send other content types here without permission
    # (CORS), but not this one.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected Content-Type: application/json")
    length = request.headers.get("content-length", "")
    if not length.isdecimal():  # missing, as in chunked transfers
        raise HTTPException(411, "expected a Content-Length")
    if int(length) > most:
        raise HTTPException(
            413, f"{length} bytes, more than the {most} allowed; send fewer images at once"
        )
    return int(length)


async def _discard(request: Request, timeout_s: float) -> None:
    """Read the rest of a refused request. A client that is cut off while it sends sees a broken
    pipe, and never the answer that says why."""

    async def receive():
        async for _ in request.stream():
            pass

    try:
        await asyncio.wait_for(receive(), timeout_s)
    except (asyncio.TimeoutError, ClientDisconnect):  # noqa: UP041
        pass


def _read(body: bytes) -> ScoreRequest:
    """Parse and check the body of a request. ValueError, in one line, says what is wrong."""
    try:
        asked = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None
    for name in ("prompts", "metadata", "conditions_of"):
        entries = getattr(asked, name)
        if entries is not None and len(entries) * (asked.frames or 1) != len(asked.images):
            each = "" if asked.frames is None else f" of {asked.frames} frames each"
            raise ValueError(
                f"{counted(len(asked.images), 'image')}, but {len(entries)} {name}{each}"
            )
    # Rewards read paths under this key, so a client could make the server open its files.
    if any(KEY in entry for entry in asked.metadata or ()):
        raise ValueError(
            f'metadata: the key "{KEY}" is not allowed; send condition images as "conditions"'
        )
    if any(
        not 0 <= place < len(asked.conditions)
        for places in asked.conditions_of or ()
        for place in places
    ):
        raise ValueError(
            f"conditions_of: expected places from 0 to {len(asked.conditions) - 1}, in a list for"
            " each prompt"
        )
    return asked


def _open(asked: ScoreRequest, max_pixels: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """(images, condition images) of a request, not yet decoded. ValueError for more than
    `max_pixels` in both together."""
    opened = open_images(asked.images, max_pixels)
    # Condition images may have any sizes, but share the request's pixels.
    left = max_pixels - sum(image.width * image.height for image in opened)
    return opened, open_images(asked.conditions, left, name="condition", alike=False)


def _metadata(asked: ScoreRequest, conditions: list[np.ndarray]) -> list[dict]:
    """The metadata of each image, with its condition images if it has any."""
    metadata = asked.metadata or [{} for _ in asked.prompts]
    if asked.conditions_of is None:
        return metadata
    own = [
        {KEY: [conditions[place] for place in places]} if places else {}
        for places in asked.conditions_of
    ]
    return [{**entry, **images} for entry, images in zip(metadata, own, strict=True)]


def _chosen(batchers: dict[str, Batcher], name: str) -> Batcher:
    """The reward that a request names, or the only one if it names none."""
    if name in batchers:
        return batchers[name]
    if not name and len(batchers) == 1:
        return next(iter(batchers.values()))
    raise ValueError(f"no reward {name!r}; this server serves {', '.join(batchers)}")
