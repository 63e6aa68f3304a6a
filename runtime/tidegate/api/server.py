"""An ASGI app on a TCP port, run by uvicorn inside the caller's event loop.

The socket is bound before anything runs, so a busy port is one clear error and port 0 is known at
once. Signals stay the caller's: `run` ends by cancellation or after `drain`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from tidegate.api.connection import MOST_HEAD_BYTES, PatientProtocol
from tidegate.errors import ConfigError

_SEND_BUFFER_BYTES = 128 << 10
"""What the system holds for one that does not read, where it would be megabytes; it doubles it."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""Who vanished without a goodbye while nothing was sent is known after two minutes (Linux)."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone; uvicorn would replace the caller's handlers."""
        yield


class BoundServer:
    """`app` on a bound socket that accepts connections once `run` is awaited.

    No lifespan events: parts of the process are started by its task group, not by its HTTP app.

    Args:
        app: what answers.
        host: a name or address of this machine.
        port: 0 takes any free one.
        drain_s: how long calls in flight may take once it drains.
        tls: for HTTPS; it may be given another certificate while it is used.
        most_connections: more are answered with 503; None for any number.
        gone_after_s: a peer that acknowledges nothing for so long is hung up on, where the system
            can tell (Linux).
        protocol: of a connection, instead of `PatientProtocol`.

    Raises:
        ConfigError: `host` is no address of this machine, or `port` is taken or not allowed.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        drain_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
        most_connections: int | None = None,
        gone_after_s: float | None = None,
        protocol: type[asyncio.Protocol] | None = None,
    ) -> None:
        self._socket = _bind(host, port)
        if gone_after_s is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it from the socket that accepts them.
            wait_ms = round(gone_after_s * 1000)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, wait_ms)
        self.host = host
        self._tls = tls
        self.port = int(self._socket.getsockname()[1])
        """The real port, also when 0 was asked for."""
        config = uvicorn.Config(
            app,
            # On h11 both, which bounds heads, and is the same whatever else is installed.
            http=protocol or PatientProtocol,
            h11_max_incomplete_event_size=MOST_HEAD_BYTES,
            log_config=None,
            log_level="critical",  # the door logs what the app did; the rest is line noise
            lifespan="off",
            access_log=False,
            server_header=False,
            ws="none",
            limit_concurrency=most_connections,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
        config.load()
        config.ssl = tls  # ours, and not one made of file names
        self._server = _Server(config)

    @property
    def url(self) -> str:
        """`http://host:port`, or `https://`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self.port}"

    def close(self) -> None:
        """Give the port back; for a server that never ran."""
        self._socket.close()

    def drain(self) -> None:
        """Accept no more; `run` returns when the calls in flight ended, or `drain_s` later."""
        self._server.should_exit = True

    async def run(self) -> None:
        """Serve until drained. Cancelling it closes connections and cancels calls in flight."""
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            self._server.should_exit = self._server.force_exit = True
            calls = list(self._server.server_state.tasks)
            for call in calls:  # uvicorn forced to exit leaves them running
                call.cancel()
            await asyncio.gather(serving, *calls, return_exceptions=True)
            raise
        finally:
            self._socket.close()


async def serve_app(app: ASGIApp, host: str, port: int, *, drain_s: float = 30.0) -> None:
    """Serve `app` until cancelled; use `BoundServer` to learn the port or to drain.

    Raises:
        ConfigError: the address cannot be bound.
    """
    await BoundServer(app, host, port, drain_s=drain_s).run()


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError("port", port, "from 0 (any free one) to 65535")
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
    except (OSError, UnicodeError):
        raise ConfigError("host", host, "a name or address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # As with `TCP_USER_TIMEOUT`, connections inherit these.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                bound.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        bound.bind(address)
        # Listening now, not at `run`: two sockets with SO_REUSEADDR may both bind, one may listen.
        bound.listen(2048)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise _why(error, host, port) from None
    return bound


def _why(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError("port", port, f"free: another process listens on {host}:{port}")
    if error.errno == errno.EACCES:
        return ConfigError("port", port, "1024 or more, or the process must be allowed to take it")
    return ConfigError("host", host, "a name or address of this machine")
