"""The HTTP surface over an echo, behind API keys with rules: what the cloud's access tests meet."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from echobackend import EchoBackend
from starlette.applications import Starlette
from toytext import toy_text

from tidegate.api.http import create_app
from tidegate.api.server import BoundServer
from tidegate.api.settings import HttpSettings
from tidegate.cloud.access import AccessControl, written_down
from tidegate.cloud.access_settings import AccessSettings, open_access
from tidegate.cloud.api_keys import ApiKey
from tidegate.cloud.key_rules import KeyRules
from tidegate.engine.text import TextModel

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "one two three"}]}


@dataclass
class Clock:
    """Time that passes when it is told to."""

    now_s: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(kw_only=True)
class Keyed:
    """An app in this process and a client of it."""

    access: AccessControl
    app: Starlette
    backend: EchoBackend
    client: httpx.AsyncClient = field(repr=False)

    def add(self, name: str = "team", **rules: Any) -> tuple[ApiKey, str]:
        """Make a key with these rules."""
        now_s = self.access.clock()
        return self.access.keys.add(name, KeyRules(**rules), now_s=now_s)

    async def chat(self, key: str | None, **body: Any) -> httpx.Response:
        """Ask once."""
        heads = {} if key is None else {"Authorization": f"Bearer {key}"}
        return await self.client.post(CHAT, json={**HELLO, **body}, headers=heads)


def keyed_access(
    folder: Path, *, clock: Callable[[], float] | None = None, **settings: Any
) -> AccessControl:
    """Access as the service opens it, on a clock of the test's."""
    return open_access(
        AccessSettings(state=folder, **settings),
        key_hashes=(),
        clock=clock or time.time,
        ticks=clock or time.monotonic,
    )


async def text_of(_: str) -> TextModel:
    """A toy's tokens, whatever the model."""
    return toy_text()


def keyed_app(access: AccessControl, backend: EchoBackend, **settings: Any) -> Starlette:
    """The app of an access."""
    surface = replace(HttpSettings(admission=access), **settings)
    return create_app(backend, settings=surface, texts=text_of)


@asynccontextmanager
async def keyed(
    folder: Path, *, backend: EchoBackend | None = None, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[Keyed]:
    """An app over the state in `folder`, closed in the end."""
    access = keyed_access(folder, clock=clock, **settings)
    backend = backend or EchoBackend()
    app = keyed_app(access, backend)
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Keyed(access=access, app=app, backend=backend, client=client)
    finally:
        await access.close()


@contextmanager
def serving_keyed(folder: Path, **settings: Any) -> Iterator[str]:
    """The app on a port of its own, as one replica of the service; gives its URL."""
    ready, stop = threading.Event(), list[Callable[[], None]]()
    urls: list[str] = []

    async def main() -> None:
        access = keyed_access(folder, **settings)
        async with written_down(access):
            server = BoundServer(keyed_app(access, EchoBackend()), "127.0.0.1", 0, drain_s=5)
            urls.append(server.url)
            stop.append(server.drain)
            ready.set()
            await server.run()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    try:
        assert ready.wait(20), "the replica did not start"
        yield urls[0]
    finally:
        for one in stop:
            one()
        thread.join(timeout=15)
        assert not thread.is_alive(), "the replica did not end"
