"""`HttpTransport`: a device's `Transport` straight to its gateways, one connection for each URL."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence

from tidegate.errors import ConfigError, DeviceRefusedError, LinkError, UnavailableError
from tidegate.link.broker_tls import TlsFiles, tls_context
from tidegate.link.http_frames import Frame, Kind
from tidegate.link.http_peer import Peer
from tidegate.link.http_url import HttpUrl
from tidegate.link.identity import DeviceIdentity
from tidegate.link.mqtt import RECHECK_S, STEADY_S, pause_s
from tidegate.link.topics import Topics
from tidegate.link.traffic import Traffic, TrafficTally
from tidegate.link.transport import Connected, Disconnected, EventQueue, Message, TransportEvent

logger = logging.getLogger(__name__)
MOST_GATEWAYS = 8
"""Connections that a device keeps; each is one to write to and one or two to read from."""


class HttpTransport:
    """A `Transport` to gateways that serve HTTP.

    Args:
        urls: of the gateways, see `HttpUrl.parse`; more can be learned.
        who: reads the device's identity; asked for every connection, since its key may change.
        files: roots and client certificate for `https`.
        plain: allow `http` to other machines.

    Raises:
        ConfigError: a URL or a file is not usable, or there are too many.
        IdentityError: the device's keys cannot be read.
    """

    def __init__(
        self,
        urls: Sequence[str],
        who: Callable[[], DeviceIdentity],
        *,
        files: TlsFiles | None = None,
        plain: bool = False,
    ) -> None:
        if len(urls) > MOST_GATEWAYS:
            raise ConfigError("link.http", list(urls), f"at most {MOST_GATEWAYS} URLs")
        identity = who()
        self._who, self._handle = who, identity.handle
        self._topics = Topics(identity.group)
        self._queue = EventQueue()
        self._traffic = TrafficTally()
        self._rng = random.Random()
        self._given = tuple(HttpUrl.parse(url, plain=plain) for url in urls)
        self._ways = [_Way(url) for url in self._given]
        self._changed = asyncio.Event()
        self._files = files or TlsFiles()
        if any(way.url.tls for way in self._ways):
            tls_context(self._files)  # a file that cannot be used is said at once

    def learn(self, urls: Sequence[str]) -> None:
        """Use these beside the ones that were given, and none that was learned before.

        Raises:
            ConfigError: one is none.
        """
        wanted = [*self._given, *(HttpUrl.parse(url, plain=True) for url in urls)]
        before = {way.url: way for way in self._ways}
        fresh = dict.fromkeys(wanted[: max(MOST_GATEWAYS, len(self._given))])
        self._ways = [before.get(url) or _Way(url) for url in fresh]
        self._changed.set()

    @property
    def connected(self) -> bool:
        return any(way.gateway_id for way in self._ways)

    @property
    def status(self) -> str:
        return "; ".join(f"gateway {way.url}: {way.problem or 'connected'}" for way in self._ways)

    @property
    def path(self) -> str:
        return "http" if self.connected else ""

    @property
    def traffic(self) -> Traffic:
        return self._traffic.snapshot() + self._queue.traffic

    def subscribe(self, topic_filter: str) -> None:
        """A gateway sends what is for this device and nothing else."""

    def events(self) -> AsyncIterator[TransportEvent]:
        return self._queue.events()

    async def run(self) -> None:
        # It writes a line with the URL for every call.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        kept: dict[_Way, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._changed.clear()
                for way in kept.keys() - self._ways:
                    kept.pop(way).cancel()
                for way in self._ways:
                    if way not in kept:
                        kept[way] = tasks.create_task(self._keep(way))
                await self._changed.wait()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send to the gateway that `topic` names.

        Raises:
            UnavailableError: there is no connection to it. Nothing was queued.
        """
        for way in self._ways:
            own = way.gateway_id and self._topics.request(way.gateway_id, self._handle)
            if way.peer is not None and topic == own:
                await way.peer.publish(payload)
                self._traffic.add("sent_bytes", len(payload))
                return
        raise UnavailableError(f"no HTTP connection to this gateway ({self.status})")

    async def _keep(self, way: _Way) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            problem, wait_s = "", 0.0
            before = way.connections
            try:
                await self._serve(way)
            except (UnavailableError, LinkError, ConfigError) as error:
                problem = str(error)
                if isinstance(error, DeviceRefusedError):
                    problem, wait_s = f"refused: {error}", RECHECK_S
                if way.connections == before:
                    self._traffic.failed(error)
                else:
                    self._traffic.add("connections_lost")
            if problem != way.problem:
                logger.warning("gateway %s: %s; trying again", way.url, problem)
            way.problem = problem
            failures = 0 if loop.time() - began_s >= STEADY_S else failures + 1
            await asyncio.sleep(wait_s or pause_s(failures, self._rng))

    async def _serve(self, way: _Way) -> None:
        """One connection to its end, which is an exception."""
        tls = tls_context(self._files) if way.url.tls else None
        identity = await asyncio.to_thread(self._who)

        def opened(gateway_id: str) -> None:
            way.gateway_id, way.problem = gateway_id, ""
            way.connections += 1
            self._traffic.connected(str(way.url))
            self._queue.put(Connected())

        def take(frame: Frame) -> None:
            if frame.kind is Kind.ADVERT:
                topic = self._topics.advert(way.gateway_id)
            else:
                topic = self._topics.response(self._handle)
            self._queue.put(Message(topic, frame.data))

        way.peer = Peer(way.url, tls, identity, who=self._who, take=take, opened=opened)
        try:
            await way.peer.serve()
        finally:
            way.peer = None
            if way.gateway_id:
                way.gateway_id, way.problem = "", "closed"
                if not self.connected:
                    self._queue.put(Disconnected())


class _Way:
    """A URL and what there is of it now."""

    def __init__(self, url: HttpUrl) -> None:
        self.url = url
        self.peer: Peer | None = None
        self.gateway_id = ""
        """Of the gateway whose stream stands; empty without one."""
        self.connections = 0
        """Streams that stood."""
        self.problem = "not connected yet"
