"""An engine and its HTTP surface on loopback, and a client of it, for tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from toyengine import serving as running

from tidegate.api.engine_backend import EngineBackend
from tidegate.api.http import create_app
from tidegate.api.server import BoundServer
from tidegate.engine.engine import Engine

CHAT = "/v1/chat/completions"


def body(said: str = "hello", **fields: object) -> dict[str, object]:
    """A greedy chat of one message."""
    return {"messages": [{"role": "user", "content": said}], "temperature": 0, **fields}


@asynccontextmanager
async def served(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    """Both run around a block."""
    backend = EngineBackend(engine, route="edge", created_s=0)
    app = create_app(backend, texts=backend.text_of)
    server = BoundServer(app, "127.0.0.1", 0)
    async with running(engine), httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        serving = asyncio.create_task(server.run())
        try:
            yield client
        finally:
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving


def with_engine(
    test: Callable[[httpx.AsyncClient, Engine], Awaitable[None]], engine: Engine
) -> None:
    """Run one test against a served engine."""

    async def run() -> None:
        async with served(engine) as client:
            await test(client, engine)

    asyncio.run(run())


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    """The chunks of a streamed chat that went well."""
    response = await client.post(CHAT, json=body(stream=True, **fields))
    datas = [one.removeprefix("data: ") for one in response.text.split("\n\n") if one]
    assert datas.pop() == "[DONE]"
    return [json.loads(one) for one in datas]
