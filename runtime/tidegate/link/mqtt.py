"""`MqttTransport`: a `Transport` over one MQTT broker, always trying to be connected to it.

MQTT 3.1.1, because both mosquitto and amqtt speak it and the protocol needs nothing newer; where
MQTT 5 is wanted its properties are hints. Reconnecting is ours, with full jitter, because paho has
none: a fleet whose broker restarts must not come back in one instant.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from tidegate.errors import ConfigError, LinkError, UnavailableError
from tidegate.link.broker_tls import TlsFiles, tls_context
from tidegate.link.broker_url import BrokerUrl
from tidegate.link.mqtt_connection import GOODBYE_S, Access, Connection, Will
from tidegate.link.topics import GONE, HERE
from tidegate.link.traffic import Traffic, TrafficTally
from tidegate.link.transport import Connected, Disconnected, EventQueue, TransportEvent

logger = logging.getLogger(__name__)

Check = Callable[[Access], Awaitable[None]]
"""Looks at a broker before it is used; a `LinkError` refuses it."""

STEADY_S = 5.0
"""A connection that ends sooner counts as a failure: two that throw each other out must slow
down."""
RECHECK_S = 60.0
"""Between looks at a broker that was refused."""
_RECONNECT_MIN_S = 0.2
_RECONNECT_MAX_S = 15.0
_FLOOR_S = 0.05


class MqttTransport:
    """A `Transport` over one MQTT broker.

    Args:
        url: see `BrokerUrl.parse`.
        ca_file: PEM roots for `mqtts`; the system's by default.
        files: roots and client certificate for `mqtts`, instead of `ca_file`.
        presence: topic to keep a retained sign of life on, by a last will.
        canary: topic to keep random bytes on: see `broker_check`.
        check: looks at the broker before the first connection is used, and again after a refusal.
        mqtt5: speak MQTT 5 where the broker does, for its hints.

    Raises:
        ConfigError: the URL or a file is not usable.
    """

    def __init__(
        self,
        url: str,
        *,
        ca_file: Path | None = None,
        files: TlsFiles | None = None,
        presence: str | None = None,
        canary: str | None = None,
        check: Check | None = None,
        mqtt5: bool = False,
    ) -> None:
        self._url = BrokerUrl.parse(url)
        self._files = files or TlsFiles(ca=ca_file)
        context = tls_context(self._files) if self._url.tls else None
        self._access = Access(url=self._url, tls=context, mqtt5=mqtt5)
        self._presence = presence
        self._canary = canary
        self._check = check
        self._filters: list[str] = []
        self._queue = EventQueue()
        self._traffic = TrafficTally()
        self._connection: Connection | None = None
        self._problem = "not connected yet"
        self._rng = random.Random()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def status(self) -> str:
        return f"broker {self._url}: " + ("connected" if self.connected else self._problem)

    @property
    def path(self) -> str:
        return "mqtt" if self.connected else ""

    @property
    def traffic(self) -> Traffic:
        return self._traffic.snapshot() + self._queue.traffic

    @property
    def looks_first(self) -> bool:
        """It will look at the broker before it uses it."""
        return self._check is not None

    def subscribe(self, topic_filter: str) -> None:
        self._filters.append(topic_filter)

    def events(self) -> AsyncIterator[TransportEvent]:
        return self._queue.events()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        connection = self._connection
        if connection is None:
            raise UnavailableError(self.status)
        await connection.publish(topic, payload, retain=retain)
        self._traffic.add("sent_bytes", len(payload))

    async def run(self) -> None:
        failures = 0
        told: set[str] = set()
        while True:
            began_s = asyncio.get_running_loop().time()
            try:
                await self._serve_once()
                told.clear()
                steady = asyncio.get_running_loop().time() - began_s >= STEADY_S
                failures = 0 if steady else failures + 1
                wait_s = pause_s(failures, self._rng)
            except UnavailableError as error:
                self._traffic.failed(error)
                # Each once while it is away: TLS does not say at every try why it was refused.
                if str(error) not in told:
                    logger.warning("broker %s: %s; trying again", self._url, error)
                told.add(str(error))
                self._problem = str(error)
                failures += 1
                wait_s = pause_s(failures, self._rng)
            except LinkError as error:
                self._traffic.failed(error)
                logger.error("broker %s: refused: %s", self._url, error)
                self._problem = f"refused: {error}"
                wait_s = RECHECK_S
            await asyncio.sleep(wait_s)

    def _fresh_tls(self) -> ssl.SSLContext | None:
        """The files as they are now: a certificate may have been renewed. A half is not used."""
        if self._access.tls is None:
            return None
        try:
            return tls_context(self._files)
        except ConfigError as error:
            logger.warning("the broker's TLS files are not used: %s", error)
            return self._access.tls

    async def _serve_once(self) -> None:
        """One connection from its first byte to its end.

        Raises:
            UnavailableError: it was never established.
            LinkError: the check refuses this broker.
        """
        if self._check is not None:
            await self._check(self._access)
            self._check = None
        self._access = replace(self._access, tls=self._fresh_tls())
        session = secrets.token_bytes(16)
        will = (
            None if self._presence is None else Will(topic=self._presence, payload=GONE + session)
        )
        connection = await self._open(will)
        try:
            if self._filters and not all(await connection.subscribe(self._filters)):
                raise UnavailableError("refused: not allowed to subscribe")
            if self._presence is not None:
                await connection.publish(self._presence, HERE + session, retain=True)
            if self._canary is not None:
                await connection.publish(self._canary, secrets.token_bytes(32), retain=True)
            self._connection = connection
            self._traffic.connected()
            self._queue.put(Connected())
            await connection.serve()
            self._traffic.add("connections_lost")
        except asyncio.CancelledError:
            await self._leave(connection, session)
            raise
        finally:
            await connection.close()
            if self._connection is not None:
                self._connection = None
                self._problem = connection.problem
                self._queue.put(Disconnected())

    async def _open(self, will: Will | None) -> Connection:
        """A connection that stands; in MQTT 3.1.1 where the broker has never heard of 5.

        Raises:
            UnavailableError: there is none.
        """
        connection = Connection(self._access, self._queue, will=will)
        try:
            await connection.open()
        except BaseException as error:
            await connection.close()
            # Such a broker says so, or just hangs up.
            known = connection.answered and self._access.mqtt5
            if not (known and isinstance(error, UnavailableError)):
                raise
        else:
            return connection
        self._access = replace(self._access, mqtt5=False)
        connection = Connection(self._access, self._queue, will=will)
        try:
            await connection.open()
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _leave(self, connection: Connection, session: bytes) -> None:
        """Let what is in flight arrive, then go; a goodbye cancels the will: say it ourselves."""
        if self._connection is None:
            return
        self._problem = "closed"
        try:
            async with asyncio.timeout(GOODBYE_S):
                if self._presence is not None:
                    await connection.publish(self._presence, GONE + session, retain=True)
                await connection.drain(GOODBYE_S)
        except (UnavailableError, TimeoutError):
            return


def pause_s(failures: int, rng: random.Random) -> float:
    """Before try `failures + 1`: anything up to a bound that doubles (full jitter)."""
    longest_s = min(_RECONNECT_MAX_S, _RECONNECT_MIN_S * 2.0 ** min(failures, 10))
    return max(_FLOOR_S, rng.uniform(0.0, longest_s))
