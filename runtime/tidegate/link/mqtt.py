"""MQTT 3.1.1 through paho-mqtt on the asyncio loop: the one file that knows paho.

3.1.1 because both mosquitto and amqtt speak it and the protocol needs nothing newer. paho 2.x has
traps (reference: paho issues #492, #365, #894, #346, #183) and each shapes something here:

* no paho thread and no `select`: the loop watches the socket, so a file descriptor above 1023 or
  a dead thread cannot silence us;
* a fresh client per connection: paho repeats its whole backlog at a reconnect, and the link
  repeats what matters itself;
* our own window of publishes in flight, because paho ignores what a broker can take;
* callbacks only set futures and fill a queue, and exceptions in them are contained;
* our own reconnecting, with jitter, because paho has none.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from tidegate.errors import ConfigError, UnavailableError
from tidegate.link.transport import Connected, Disconnected, EventQueue, Message, TransportEvent

logger = logging.getLogger(__name__)

WINDOW_PUBLISHES = 16
"""Publishes without PUBACK; below the smallest receive maximum in common use (20)."""
KEEPALIVE_S = 30
CONNECT_TIMEOUT_S = 5.0
ACKNOWLEDGE_TIMEOUT_S = 30.0
"""A broker that answers pings but acknowledges nothing for this long is left."""
_RECONNECT_MIN_S = 0.2
_RECONNECT_MAX_S = 15.0
_MISC_EVERY_S = 1.0
_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokerUrl:
    """Where the broker is. Its `str` and `repr` never show the password."""

    host: str
    port: int
    tls: bool
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> BrokerUrl:
        """Parse `mqtt://[user[:password]@]host[:port]` or `mqtts://...`.

        Raises:
            ConfigError: it is something else. The message never repeats the user part; a `#`, `?`
                or `/` in a password must be written as %23, %3F or %2F.
        """
        shown = f"...@{url.rsplit('@', 1)[-1]}" if "@" in url else url
        allowed = "mqtt://host[:port] or mqtts://host[:port], with a port from 1 to 65535"
        try:
            parts = urlsplit(url)
            port = _DEFAULT_PORTS.get(parts.scheme) if parts.port is None else parts.port
        except ValueError:
            # Its own text, and so the cause, may quote the password.
            raise ConfigError("broker", shown, allowed) from None
        odd = any(sign in url for sign in "#?\\") or not url.isprintable() or " " in url
        known = parts.scheme in _DEFAULT_PORTS
        if odd or not known or not port or not parts.hostname or parts.path not in ("", "/"):
            raise ConfigError("broker", shown, allowed)
        return cls(
            host=parts.hostname,
            port=port,
            tls=parts.scheme == "mqtts",
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
        )


class MqttTransport:
    """A `Transport` over one MQTT broker.

    Args:
        url: see `BrokerUrl.parse`.
        ca_file: PEM roots for `mqtts`; the system's by default.

    Raises:
        ConfigError: the URL or the file is not usable.
    """

    def __init__(self, url: str, *, ca_file: Path | None = None) -> None:
        self._url = BrokerUrl.parse(url)
        self._tls = _tls_context(self._url, ca_file)
        self._filters: list[str] = []
        self._queue = EventQueue()
        self._connection: _Connection | None = None
        self._problem = "not connected yet"
        self._rng = random.Random()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def status(self) -> str:
        return f"broker {self._url}: " + ("connected" if self.connected else self._problem)

    @property
    def dropped(self) -> int:
        """Messages that arrived and were thrown away: see `EventQueue`."""
        return self._queue.dropped

    def subscribe(self, topic_filter: str) -> None:
        self._filters.append(topic_filter)

    def events(self) -> AsyncIterator[TransportEvent]:
        return self._queue.events()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        connection = self._connection
        if connection is None:
            raise UnavailableError(self.status)
        await connection.publish(topic, payload, retain=retain)

    async def run(self) -> None:
        failures = 0
        while True:
            try:
                await self._serve_once()
                failures = 0
            except UnavailableError as error:
                if failures == 0:
                    logger.warning("broker %s: %s; trying again", self._url, error)
                self._problem = str(error)
                failures += 1
            longest_s = min(_RECONNECT_MAX_S, _RECONNECT_MIN_S * 2.0 ** min(failures, 10))
            await asyncio.sleep(longest_s * self._rng.uniform(0.5, 1.0))

    async def _serve_once(self) -> None:
        """One connection from its first byte to its end.

        Raises:
            UnavailableError: it was never established.
        """
        connection = _Connection(self._url, self._tls, self._queue)
        try:
            await connection.open(self._filters)
            self._connection = connection
            self._queue.put(Connected())
            await connection.serve()
        finally:
            await connection.close()
            if self._connection is not None:
                self._connection = None
                self._problem = connection.problem
                self._queue.put(Disconnected())


class _Connection:
    """One paho client and its socket on the loop; never reused."""

    def __init__(self, url: BrokerUrl, tls: ssl.SSLContext | None, events: EventQueue) -> None:
        self.problem = "connection lost"
        self._url = url
        self._loop = asyncio.get_running_loop()
        self._events = events
        self._window = asyncio.Semaphore(WINDOW_PUBLISHES)
        self._lost = asyncio.Event()
        self._accepted: asyncio.Future[str | None] = self._loop.create_future()
        self._subscribed: asyncio.Future[str | None] = self._loop.create_future()
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"tidegate-{secrets.token_hex(8)}",
            clean_session=True,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.suppress_exceptions = True
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(0)
        if url.username is not None:
            client.username_pw_set(url.username, url.password)
        if tls is not None:
            client.tls_set_context(tls)
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message

    async def open(self, filters: list[str]) -> None:
        """Connect and subscribe.

        Raises:
            UnavailableError: the broker does not answer or refuses.
        """
        try:
            # paho's connect blocks (name lookup, TCP, TLS): not on the loop.
            await self._finish(self._loop.run_in_executor(None, self._connect))
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._expect(self._accepted)
                if filters:
                    self._client.subscribe([(topic_filter, 1) for topic_filter in filters])
                    await self._expect(self._subscribed)
        except TimeoutError:
            raise UnavailableError(f"no answer within {CONNECT_TIMEOUT_S:g} s") from None
        except (OSError, ValueError) as error:
            raise UnavailableError(f"cannot connect ({_reason(error)})") from error

    async def _finish(self, connecting: asyncio.Future[None]) -> None:
        """Wait for the thread even when cancelled: its socket would be left open otherwise."""
        try:
            await asyncio.shield(connecting)
        except asyncio.CancelledError:
            await asyncio.wait([connecting])
            connecting.exception()
            raise

    def _connect(self) -> None:
        self._client.connect(self._url.host, self._url.port, keepalive=KEEPALIVE_S)

    async def _expect(self, answer: asyncio.Future[str | None]) -> None:
        """Wait for a future that holds None or what went wrong."""
        problem = await answer
        if problem is not None:
            raise UnavailableError(problem)

    async def serve(self) -> None:
        """Return when the connection is lost."""
        while not self._lost.is_set():
            self._client.loop_misc()
            try:
                async with asyncio.timeout(_MISC_EVERY_S):
                    await self._lost.wait()
            except TimeoutError:
                continue

    async def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        try:
            async with asyncio.timeout(ACKNOWLEDGE_TIMEOUT_S):
                await self._window.acquire()
        except TimeoutError:
            self._fail("the broker has stopped acknowledging")
            raise UnavailableError(self.problem) from None
        if self._lost.is_set():
            self._window.release()
            raise UnavailableError(self.problem)
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._fail("connection lost")
            raise UnavailableError(self.problem)

    async def close(self) -> None:
        """Say goodbye if possible and free the socket."""
        self._fail("closed")
        client = self._client
        if client.is_connected():
            client.disconnect()
            client.loop_write()
        sock = client.socket()
        if sock is not None:
            self._forget(sock)
        client.on_socket_open = client.on_socket_close = None
        client.on_socket_register_write = client.on_socket_unregister_write = None
        if sock is not None:
            sock.close()

    def _fail(self, problem: str) -> None:
        """Wake everyone who waits for this connection."""
        if self._lost.is_set():
            return
        self.problem = problem
        self._lost.set()
        for answer in (self._accepted, self._subscribed):
            if not answer.done():
                answer.set_result(problem)
        # Publishers waiting for room get it, and find the connection lost.
        for _ in range(WINDOW_PUBLISHES):
            self._window.release()

    # Socket callbacks. `connect` runs in a worker thread, so these may too.

    def _on_socket_open(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        # Two small packets in a row would otherwise wait for a delayed ACK: 40 ms per answer.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.call_soon_threadsafe(self._watch, sock)

    def _watch(self, sock: Any) -> None:
        if not self._lost.is_set() and sock.fileno() >= 0:
            self._loop.add_reader(sock, self._readable, sock)

    def _on_socket_close(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._forget(sock)

    def _forget(self, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)

    def _on_register_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch_writable, sock)

    def _watch_writable(self, sock: Any) -> None:
        if not self._lost.is_set() and sock.fileno() >= 0 and self._client.want_write():
            self._loop.add_writer(sock, self._writable)

    def _on_unregister_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.call_soon_threadsafe(self._unwatch_writable, sock)

    def _unwatch_writable(self, sock: Any) -> None:
        if sock.fileno() >= 0 and not self._client.want_write():
            self._loop.remove_writer(sock)

    def _readable(self, sock: Any) -> None:
        self._client.loop_read()
        # TLS may have decrypted more than one packet: the socket will not turn readable for it.
        while isinstance(sock, ssl.SSLSocket) and sock.fileno() >= 0 and sock.pending():
            if self._client.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return

    def _writable(self) -> None:
        self._client.loop_write()

    # Protocol callbacks, on the loop. They only record.

    def _on_connect(
        self, client: paho.Client, userdata: Any, flags: Any, code: Any, props: Any
    ) -> None:
        if not self._accepted.done():
            self._accepted.set_result(f"refused: {code}" if code.is_failure else None)

    def _on_subscribe(
        self, client: paho.Client, userdata: Any, mid: int, codes: Any, props: Any
    ) -> None:
        refused = any(code.is_failure for code in codes)
        if not self._subscribed.done():
            self._subscribed.set_result("refused: not allowed to subscribe" if refused else None)

    def _on_disconnect(
        self, client: paho.Client, userdata: Any, flags: Any, code: Any, props: Any
    ) -> None:
        self._fail("connection lost")

    def _on_publish(
        self, client: paho.Client, userdata: Any, mid: int, code: Any, props: Any
    ) -> None:
        self._window.release()

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        self._events.put(Message(message.topic, bytes(message.payload)))


class _ClosingSocket(ssl.SSLSocket):
    """paho forgets a socket whose handshake failed; this one closes itself."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def _tls_context(url: BrokerUrl, ca_file: Path | None) -> ssl.SSLContext | None:
    if not url.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("broker.ca_file", str(ca_file), "a file of PEM certificates") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _ClosingSocket
    return context


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "unknown host"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return type(error).__name__
