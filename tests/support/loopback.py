"""A real server on loopback, in its own thread: what clients meet, and what they can abuse."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp

from tidegate.api.server import BoundServer


@contextmanager
def serving(
    app: ASGIApp, *, drain_s: float = 5.0, protocol: type[asyncio.Protocol] | None = None
) -> Iterator[BoundServer]:
    """Serve `app` on a free port while the block runs."""
    server = BoundServer(app, "127.0.0.1", 0, drain_s=drain_s, protocol=protocol)
    thread = threading.Thread(target=lambda: asyncio.run(server.run()), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.drain()
        thread.join(timeout=drain_s + 5)
        assert not thread.is_alive(), "the server did not drain"
