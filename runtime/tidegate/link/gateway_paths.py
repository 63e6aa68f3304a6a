"""A gateway's two paths as one `Transport`: the broker, and HTTP for devices that have it open.

Adverts go both ways. An answer goes over HTTP while its device has a stream open there, which it
has proved, and otherwise over the broker. A device that was heard through the broker since then may
have lost its stream without our knowing, so it is answered on both: the session drops what comes
twice, and nobody on the broker can talk an answer away from a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from tidegate.errors import UnavailableError
from tidegate.link.counters import Tally
from tidegate.link.effects import Publish
from tidegate.link.http_hub import GOODBYE_S, HttpHub
from tidegate.link.sending import Outgoing
from tidegate.link.topics import last_level
from tidegate.link.traffic import Traffic
from tidegate.link.transport import EventQueue, Message, Transport, TransportEvent


class GatewayPaths:
    """The broker and a hub, in one.

    Args:
        broker: the first path.
        hub: the second one.
    """

    def __init__(self, broker: Transport, hub: HttpHub) -> None:
        self._topics = hub.topics
        self._broker, self._hub = broker, hub
        self._queue = EventQueue()
        self._lost = Tally()
        # A queue of its own: a broker that hangs must not hold up who comes over HTTP.
        self._to_broker = Outgoing(broker, self._lost)
        self._on_both: set[str] = set()

    @property
    def connected(self) -> bool:
        """Devices can come on one of them."""
        return self._broker.connected or self._hub.connected

    @property
    def status(self) -> str:
        return f"{self._broker.status}; {self._hub.status}"

    @property
    def path(self) -> str:
        """All that are up, with a plus in between."""
        return "+".join(path for path in (self._broker.path, self._hub.path) if path)

    @property
    def traffic(self) -> Traffic:
        lost = self._lost.snapshot().publish_failures
        own = Traffic(overflowed=self._queue.dropped + lost)
        return self._broker.traffic + self._hub.traffic + own

    def subscribe(self, topic_filter: str) -> None:
        self._broker.subscribe(topic_filter)

    def events(self) -> AsyncIterator[TransportEvent]:
        return self._queue.events()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pump_broker())
            tasks.create_task(self._pump_hub())
            tasks.create_task(self._broker.run())
            tasks.create_task(self._hub.run())
            tasks.create_task(self._to_broker.run())
            try:
                await asyncio.Event().wait()
            finally:
                await self._to_broker.drain(GOODBYE_S)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send on the path, or paths, that lead to whom it is for.

        A broker that is slow makes its callers wait only while nobody reads over HTTP: the answers
        of those who do come through here, too. Sessions and their credit bound what waits then.

        Raises:
            UnavailableError: none of them is up.
        """
        handle = last_level(topic)
        everyone = self._topics.is_advert(topic)
        streams = everyone or self._hub.has(handle)
        if streams:
            await self._hub.publish(topic, payload, retain=retain)
        if streams and not everyone and handle not in self._on_both:
            return
        if self._broker.connected:
            if not self._hub.handles:
                await self._to_broker.room()
            self._to_broker.put(Publish(topic=topic, payload=payload, retain=retain))
        elif not streams:
            raise UnavailableError(self.status)

    async def _pump_broker(self) -> None:
        async for event in self._broker.events():
            if isinstance(event, Message):
                self._heard(event.topic, by_broker=True)
            self._queue.put(event)

    async def _pump_hub(self) -> None:
        async for event in self._hub.events():
            if isinstance(event, Message):
                self._heard(event.topic, by_broker=False)
            self._queue.put(event)

    def _heard(self, topic: str, *, by_broker: bool) -> None:
        handle = last_level(topic)
        if topic != self._topics.request(self._hub.gateway_id, handle):
            return
        if handle in self._on_both and by_broker:
            return
        if by_broker and self._hub.has(handle):
            self._on_both = {one for one in self._on_both if self._hub.has(one)} | {handle}
        else:
            self._on_both.discard(handle)
