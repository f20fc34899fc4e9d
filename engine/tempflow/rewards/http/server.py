"""The web application of the reward server: who may ask, how much at once, and what is answered
when (see `protocol.py`).

Memory is bounded before it is taken: a request must say its length, and is refused with 503 while
those being served fill `Limits.memory_bytes`; sizes of images are checked before they are decoded.
Nothing is written to disk.
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
    """request_bytes: of a request's body. request_pixels: of its images together. memory_bytes: of
    the bodies and decoded images of all requests being served. timeout_s: from a request's arrival
    to its answer."""

    request_bytes: int = 256 << 20
    request_pixels: int = 128_000_000
    memory_bytes: int = 4 << 30
    timeout_s: float = 60.0


class ScoreRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    reward: str = ""
    images: list[str] = Field(min_length=1)
    prompts: list[str]
    metadata: list[dict] | None = None
    frames: int | None = Field(None, ge=1)
    conditions: list[str] = []
    conditions_of: list[list[int]] | None = None


class _Memory:
    """What requests being served may hold together. For the event loop's thread alone."""

    def __init__(self, limit: int):
        self._free = limit

    @contextmanager
    def hold(self, size: int):
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
    """The application that serves `batchers` by name; `token`, unless None, is asked of everyone
    but /health."""
    app = FastAPI(
        title="TempFlow-GRPO reward server", docs_url=None, redoc_url=None, openapi_url=None
    )
    memory = _Memory(limits.memory_bytes)

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
                raise HTTPException(400, "the request was not sent whole") from None

    async def answer(request: Request) -> dict:
        body = await request.body()
        try:
            asked = await run_in_threadpool(_read, body)
            batcher = _chosen(batchers, asked.reward)
            if asked.frames is not None and not batcher.takes_videos:
                raise ValueError(
                    f"reward {batcher.name!r} scores images, and videos came; its entry needs"
                    ' "frames": 4, not "videos": true'
                )
            opened, conditions = await run_in_threadpool(_open, asked, limits.request_pixels)
            with memory.hold(decoded_bytes(opened) + decoded_bytes(conditions)):
                images = as_media(await run_in_threadpool(decode, opened), asked.frames)
                metadata = _metadata(
                    asked, await run_in_threadpool(decode, conditions, "condition")
                )
                futures = batcher.submit(images, asked.prompts, metadata)
                parts = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except ScoringFailed as error:
            raise HTTPException(500, str(error)) from None
        return write_answer(joined(parts))

    return app


def _authorise(request: Request, token: str | None) -> None:
    sent = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
        raise HTTPException(
            401, "this server needs its bearer token", headers={"WWW-Authenticate": "Bearer"}
        )


def _body_length(request: Request, most: int) -> int:
    """The body's length, which the web server holds the client to. It is asked to be JSON by name
    because web pages cannot send that to another origin unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected Content-Type: application/json")
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise HTTPException(411, "expected a Content-Length")
    if int(length) > most:
        raise HTTPException(
            413, f"{length} bytes, more than the {most} allowed; send fewer images at once"
        )
    return int(length)


async def _discard(request: Request, timeout_s: float) -> None:
    """Let the client finish sending: one that is cut off mid-way sees a broken pipe, and never the
    answer."""

    async def receive():
        async for _ in request.stream():
            pass

    try:
        await asyncio.wait_for(receive(), timeout_s)
    except (asyncio.TimeoutError, ClientDisconnect):  # noqa: UP041
        pass


def _read(body: bytes) -> ScoreRequest:
    """ValueError, in one line, for what is no ScoreRequest."""
    try:
        asked = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None
    for name in ("prompts", "metadata", "conditions_of"):
        entries = getattr(asked, name)
        if entries is not None and len(entries) * (asked.frames or 1) != len(asked.images):
            each = "" if asked.frames is None else f" of {asked.frames} frames each"
            raise ValueError(f"{len(asked.images)} images, but {len(entries)} {name}{each}")
    if any(KEY in entry for entry in asked.metadata or ()):
        raise ValueError(f'metadata: "{KEY}" is taken; condition images travel in "conditions"')
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
    """The images and the condition images of a request, not yet decoded; ValueError for more than
    `max_pixels` in both."""
    opened = open_images(asked.images, max_pixels)
    left = max_pixels - sum(image.width * image.height for image in opened)
    return opened, open_images(asked.conditions, left, name="condition", alike=False)


def _metadata(asked: ScoreRequest, conditions: list[np.ndarray]) -> list[dict]:
    """What the reward is told of each image; its condition images are among it where it has any."""
    metadata = asked.metadata or [{} for _ in asked.prompts]
    if asked.conditions_of is None:
        return metadata
    own = [
        {KEY: [conditions[place] for place in places]} if places else {}
        for places in asked.conditions_of
    ]
    return [{**entry, **images} for entry, images in zip(metadata, own, strict=True)]


def _chosen(batchers: dict[str, Batcher], name: str) -> Batcher:
    if name in batchers:
        return batchers[name]
    if not name and len(batchers) == 1:
        return next(iter(batchers.values()))
    raise ValueError(f"no reward {name!r}; this server serves {', '.join(batchers)}")
