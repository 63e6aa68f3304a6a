"""One MQTT connection: a paho client and its socket on the asyncio loop, never reused.

This file and `mqtt_socket` know paho 2.x, whose traps (its issues #492, #365, #894, #346, #183)
shape them:

* no paho thread and no `select`: see `mqtt_socket`;
* a fresh client per connection: paho repeats its whole backlog at a reconnect, and the link
  repeats what matters itself;
* our own window of publishes in flight, because paho ignores what a broker can take;
* callbacks only set futures and fill a queue, and exceptions in them are contained;
* nobody waits on paho's message objects (`wait_for_publish`), only on our own record of PUBACKs;
* a watchdog: a broker that acknowledges nothing, or says nothing at all, is left.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tidegate.errors import UnavailableError
from tidegate.link.broker_tls import describe_ssl
from tidegate.link.broker_url import BrokerUrl
from tidegate.link.mqtt_socket import PahoSocket
from tidegate.link.transport import EventQueue, Message
from tidegate.link.wire import MAX_MESSAGE_BYTES

WINDOW_PUBLISHES = 16
"""Publishes without PUBACK; below the smallest receive maximum in common use (20)."""
KEEPALIVE_S = 30
CONNECT_TIMEOUT_S = 5.0
ACKNOWLEDGE_TIMEOUT_S = 15.0
"""A broker that leaves a publish unacknowledged for this long is left."""
PING_ANSWER_S = 10.0
"""After `KEEPALIVE_S` of silence paho pings; a broker silent for this much longer is left."""
GOODBYE_S = 1.0
"""How long a closing connection waits for what is in flight to be acknowledged."""
MESSAGE_EXPIRY_S = 300
"""A hint to MQTT 5 brokers: nobody wants a message after this. Retained ones have none."""
_TICK_S = 1.0
"""Between looks at the connection. Silence is counted in these, not read off a clock: a machine
that slept has not heard anything for hours, and what it was sent may lie in its socket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Will:
    """What the broker publishes, retained, when the connection ends without a goodbye."""

    topic: str
    payload: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How to reach a broker."""

    url: BrokerUrl
    tls: ssl.SSLContext | None = field(repr=False)
    mqtt5: bool = False


@dataclass(slots=True)
class _Sent:
    """A publish in flight: since which tick, and who wants to know whether it was allowed."""

    at_tick: int
    allowed: asyncio.Future[bool] | None


class Connection:
    """One connection from `open` to `close`."""

    def __init__(self, access: Access, events: EventQueue, *, will: Will | None = None) -> None:
        self.problem = "connection lost"
        self._access = access
        self._loop = asyncio.get_running_loop()
        self._events = events
        self._window = asyncio.Semaphore(0)
        self._in_flight: dict[int, _Sent] = {}
        self._all_acknowledged = asyncio.Event()
        self._all_acknowledged.set()
        self._lost = asyncio.Event()
        self._tick = self._heard_tick = 0
        self._most_bytes = MAX_MESSAGE_BYTES
        self._accepted: asyncio.Future[str | None] = self._loop.create_future()
        self._subscribed: asyncio.Future[tuple[bool, ...]] | None = None
        self._client = self._make_client(will)
        self._socket = PahoSocket(self._client, heard=self._on_heard, broken=self._fail)

    def _make_client(self, will: Will | None) -> paho.Client:
        mqtt5 = self._access.mqtt5
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"tidegate-{secrets.token_hex(8)}",
            clean_session=None if mqtt5 else True,
            protocol=MQTTProtocolVersion.MQTTv5 if mqtt5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.suppress_exceptions = True
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(0)
        if self._access.url.username is not None:
            client.username_pw_set(self._access.url.username, self._access.url.password)
        if self._access.tls is not None:
            client.tls_set_context(self._access.tls)
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        return client

    async def open(self) -> None:
        """Connect.

        Raises:
            UnavailableError: the broker does not answer or refuses.
        """
        try:
            # paho's connect blocks (name lookup, TCP, TLS): not on the loop.
            await self._finish(self._loop.run_in_executor(None, self._connect))
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                problem = await self._accepted
        except TimeoutError as error:
            raise UnavailableError(f"no answer within {CONNECT_TIMEOUT_S:g} s") from error
        except (OSError, ValueError) as error:
            raise UnavailableError(f"cannot connect ({_reason(error)})") from error
        if problem is not None:
            raise UnavailableError(problem)

    @property
    def answered(self) -> bool:
        """The connection stood, whatever the broker then said to our CONNECT."""
        return self._socket.opened

    async def _finish(self, connecting: asyncio.Future[None]) -> None:
        """Wait for the thread even when cancelled: its socket would be left open otherwise."""
        try:
            await asyncio.shield(connecting)
        except asyncio.CancelledError:
            await asyncio.wait([connecting])
            connecting.exception()
            raise

    def _connect(self) -> None:
        url = self._access.url
        if self._access.mqtt5:
            self._client.connect(url.host, url.port, keepalive=KEEPALIVE_S, clean_start=True)
        else:
            self._client.connect(url.host, url.port, keepalive=KEEPALIVE_S)

    async def subscribe(self, filters: list[str]) -> tuple[bool, ...]:
        """Subscribe at QoS 1; for each filter whether the broker granted it.

        Raises:
            UnavailableError: the connection is lost, or there is no answer in time.
        """
        self._check_alive()
        self._subscribed = self._loop.create_future()
        self._client.subscribe([(topic_filter, 1) for topic_filter in filters])
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                granted = await self._subscribed
        except TimeoutError:
            raise UnavailableError(f"no answer within {CONNECT_TIMEOUT_S:g} s") from None
        self._check_alive()
        return granted

    async def serve(self) -> None:
        """Return when the connection is lost."""
        while not self._lost.is_set():
            self._tick += 1
            self._client.loop_misc()
            self._watch_for_silence()
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._lost.wait()
            except TimeoutError:
                continue

    def _watch_for_silence(self) -> None:
        oldest = next(iter(self._in_flight.values()), None)
        if oldest is not None and self._ticks_s(oldest.at_tick) > ACKNOWLEDGE_TIMEOUT_S:
            self._fail("the broker has stopped acknowledging")
        elif self._ticks_s(self._heard_tick) > KEEPALIVE_S + PING_ANSWER_S:
            self._fail("the broker has fallen silent")

    def _ticks_s(self, since_tick: int) -> float:
        return (self._tick - since_tick) * _TICK_S

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send at QoS 1, once the window has room.

        Raises:
            UnavailableError: the connection is lost, or the broker takes no message so large.
        """
        await self._send(topic, payload, retain=retain, allowed=None)

    async def try_publish(self, topic: str, payload: bytes) -> bool:
        """Send, wait for the PUBACK and say whether it was allowed; only MQTT 5 brokers tell.

        Raises:
            UnavailableError: the connection is lost first.
        """
        allowed: asyncio.Future[bool] = self._loop.create_future()
        await self._send(topic, payload, retain=False, allowed=allowed)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                answer = await allowed
        except TimeoutError:
            raise UnavailableError(f"no answer within {CONNECT_TIMEOUT_S:g} s") from None
        if allowed.done() and not answer:
            self._check_alive()
        return answer

    async def _send(
        self, topic: str, payload: bytes, *, retain: bool, allowed: asyncio.Future[bool] | None
    ) -> None:
        if len(payload) > self._most_bytes:
            problem = f"{len(payload)} bytes: must be at most {self._most_bytes} for this broker"
            raise UnavailableError(problem)
        # `serve` ends a connection that acknowledges nothing, and so this wait.
        await self._window.acquire()
        if self._lost.is_set():
            self._window.release()
            raise UnavailableError(self.problem)
        properties = None
        if self._access.mqtt5 and not retain:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.MessageExpiryInterval = MESSAGE_EXPIRY_S
        info = self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._fail(self._why())
            raise UnavailableError(self.problem)
        self._in_flight[info.mid] = _Sent(self._tick, allowed)
        self._all_acknowledged.clear()

    def _check_alive(self) -> None:
        if self._lost.is_set():
            raise UnavailableError(self.problem)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged everything, at most so long; False if not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_acknowledged.wait()
        except TimeoutError:
            return False
        return not self._lost.is_set()

    async def close(self) -> None:
        """Say goodbye if possible and free the socket."""
        self._fail("closed")
        client = self._client
        if client.is_connected():
            client.disconnect()
            client.loop_write()
        self._socket.close()

    def _why(self) -> str:
        """What ended it, as far as TLS told."""
        told = self._socket.tls_failure
        return "connection lost" if told is None else f"connection lost (TLS: {told})"

    def _on_heard(self) -> None:
        self._heard_tick = self._tick

    def _fail(self, problem: str) -> None:
        """Wake everyone who waits for this connection."""
        if self._lost.is_set():
            return
        self.problem = problem
        self._lost.set()
        self._socket.stop()
        if not self._accepted.done():
            self._accepted.set_result(problem)
        if self._subscribed is not None and not self._subscribed.done():
            self._subscribed.set_result(())
        for sent in self._in_flight.values():
            if sent.allowed is not None and not sent.allowed.done():
                sent.allowed.set_result(False)
        self._in_flight.clear()
        self._all_acknowledged.set()
        # A publisher waiting for room gets it, finds the connection lost and passes it on.
        self._window.release()

    # Protocol callbacks, on the loop. They only record.

    def _on_connect(
        self, client: paho.Client, userdata: Any, flags: Any, code: Any, props: Any
    ) -> None:
        if self._accepted.done():
            return
        if code.is_failure:
            self._accepted.set_result(f"refused: {code}")
            return
        window = getattr(props, "ReceiveMaximum", WINDOW_PUBLISHES)
        for _ in range(min(WINDOW_PUBLISHES, window)):
            self._window.release()
        packet_bytes = getattr(props, "MaximumPacketSize", None)
        if packet_bytes is not None:
            # Topic (at most 256 bytes), header and properties take the rest.
            self._most_bytes = min(self._most_bytes, packet_bytes - 300)
        self._accepted.set_result(None)

    def _on_subscribe(
        self, client: paho.Client, userdata: Any, mid: int, codes: Any, props: Any
    ) -> None:
        if self._subscribed is not None and not self._subscribed.done():
            self._subscribed.set_result(tuple(not code.is_failure for code in codes))

    def _on_disconnect(
        self, client: paho.Client, userdata: Any, flags: Any, code: Any, props: Any
    ) -> None:
        told = flags.is_disconnect_packet_from_server
        self._fail(f"disconnected by the broker: {code}" if told else self._why())

    def _on_publish(
        self, client: paho.Client, userdata: Any, mid: int, code: Any, props: Any
    ) -> None:
        sent = self._in_flight.pop(mid, None)
        if sent is None:
            return
        if sent.allowed is not None and not sent.allowed.done():
            sent.allowed.set_result(not code.is_failure)
        if not self._in_flight:
            self._all_acknowledged.set()
        self._window.release()

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        payload = bytes(message.payload)
        self._events.put(Message(message.topic, payload, retained=bool(message.retain)))


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "unknown host"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {describe_ssl(error)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return type(error).__name__
