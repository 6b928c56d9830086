"""The body of a request → bytes, a JSON object or a file, within bounds of size and time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.types import Message

from medsa_deploy.errors import PromptError

from .refusals import SlowError, TooLargeError

FIRST_SECONDS = 30.0
"""Time that a body has, however short it is."""
LEAST_RATE = 64 * 1024
"""Bytes per second that a longer body must reach on average."""
MOST_JSON = 2 * 2**20


class _Budget:
    """What a body may still take of bytes and of time."""

    def __init__(self, request: Request, most_bytes: int) -> None:
        self.most_bytes, self.received, self.start = most_bytes, 0, monotonic()
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most_bytes:
            self._refuse()

    @property
    def seconds(self) -> float:
        """Until the next bytes must have come."""
        allowed = FIRST_SECONDS + self.received / LEAST_RATE
        return max(0.001, self.start + allowed - monotonic())

    def take(self, count: int) -> None:
        """Count bytes that came."""
        self.received += count
        if self.received > self.most_bytes:
            self._refuse()

    def _refuse(self) -> None:
        raise TooLargeError(
            f"the body has more than {self.most_bytes / 2**20:.0f} MB, which is the limit"
        )


async def pieces(request: Request, *, most_bytes: int) -> AsyncIterator[bytes]:
    """The body piece by piece; TooLargeError, SlowError."""
    budget = _Budget(request, most_bytes)
    stream = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), budget.seconds)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise SlowError("the body comes too slowly: send it again") from None
        budget.take(len(piece))
        yield piece


async def read_body(request: Request, *, most_bytes: int) -> bytes:
    """The whole body."""
    return b"".join([piece async for piece in pieces(request, most_bytes=most_bytes)])


async def json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object, {} without a body; PromptError for any other."""
    body = await read_body(request, most_bytes=MOST_JSON)
    return parse_object(body) if body else {}


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Text → a JSON object; PromptError."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise PromptError(f"the request is not JSON: {e!s:.80}") from e
    if not isinstance(data, dict):
        raise PromptError(f"the request is {type(data).__name__}, expected a JSON object")
    return data


def is_number(value: Any, most: float = 1e9) -> bool:
    """Whether a value of JSON is a finite number, and not larger than `most` either way."""
    return type(value) in (int, float) and abs(value) <= most


async def save_body(request: Request, path: Path, *, most_bytes: int) -> int:
    """Write the body to a file, which is removed if it does not come whole; the bytes written."""
    size = 0
    try:
        with path.open("xb") as f:
            async for piece in pieces(request, most_bytes=most_bytes):
                size += f.write(piece)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return size


def bounded(request: Request, *, most_bytes: int) -> Request:
    """The request with a body that raises beyond the bounds, for a parser that reads it itself."""
    budget, receive = _Budget(request, most_bytes), request.receive

    async def counted() -> Message:
        try:
            message = await asyncio.wait_for(receive(), budget.seconds)
        except TimeoutError:
            raise SlowError("the body comes too slowly: send it again") from None
        budget.take(len(message.get("body", b"")))
        return message

    return Request(request.scope, counted)
