"""Request bodies, read within bounds of size and time, and the watch for a client that left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from tidegate.api.door import ClientGoneError
from tidegate.api.settings import HttpSettings
from tidegate.api.wire import parse_json
from tidegate.errors import RequestError

_T = TypeVar("_T")


async def read_json(scope: Scope, receive: Receive, settings: HttpSettings) -> object:
    """The request's body as JSON.

    Raises:
        RequestError: too long (413), too slow (408), not declared (415) or no JSON (400).
        ClientGoneError: the client left before the body was whole.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page may post other kinds to any address without asking; this one needs a preflight.
    if kind != "application/json":
        raise RequestError("Content-Type", "must be application/json", status=415)
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > settings.body_limit_bytes:
        raise _too_long(settings)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            body = await _read_body(receive, settings)
    except TimeoutError:
        problem = f"did not come whole within {settings.body_timeout_s:g} s"
        raise RequestError("body", problem, status=408) from None
    try:
        return parse_json(body)
    except ValueError as error:
        raise RequestError("body", str(error)) from None


async def _read_body(receive: Receive, settings: HttpSettings) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > settings.body_limit_bytes:
            raise _too_long(settings)
        if not message.get("more_body", False):
            return bytes(body)


def _too_long(settings: HttpSettings) -> RequestError:
    problem = f"is longer than the limit of {settings.body_limit_bytes} bytes"
    return RequestError("body", problem, status=413)


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run `work` while the block runs; it is cancelled, and its end awaited, when that ends."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns. Call it once the body was read: `receive` then tells only one thing.

    Raises:
        ClientGoneError: the client left first; `work` was cancelled and has cleaned up.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
