"""A broker and transport in memory: for tests and for both ends in one process.

It delivers like MQTT at QoS 1 and misbehaves on request: `Faults` drops, repeats, reorders and
damages messages, and `MemoryBroker.stop` cuts everyone off.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tidegate.errors import UnavailableError
from tidegate.link.traffic import Traffic, TrafficTally
from tidegate.link.transport import Connected, Disconnected, EventQueue, Message, TransportEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """Chance, 0 to 1, of each accident per delivered message."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0

    def apply(self, message: Message, rng: random.Random) -> tuple[list[Message], bool]:
        """What becomes of a message, and whether it is overtaken by the next one."""
        if rng.random() < self.drop:
            return [], False
        if rng.random() < self.corrupt and message.payload:
            at = rng.randrange(len(message.payload))
            damaged = bytearray(message.payload)
            damaged[at] ^= 1 << rng.randrange(8)
            message = Message(message.topic, bytes(damaged))
        copies = 2 if rng.random() < self.duplicate else 1
        return [message] * copies, rng.random() < self.reorder


def matches(topic_filter: str, topic: str) -> bool:
    """MQTT 3.1.1 section 4.7: '+' is one level, a last '#' is the rest."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(levels) or level not in ("+", levels[i]):
            return False
    return len(wanted) == len(levels)


class MemoryBroker:
    """Topics, retained messages and accidents. `seen` holds every message published."""

    def __init__(self, *, faults: Faults | None = None, rng: random.Random | None = None) -> None:
        self.faults = faults or Faults()
        self.seen: list[Message] = []
        self._rng = rng or random.Random(0)
        self._up = asyncio.Event()
        self._up.set()
        self._retained: dict[str, Message] = {}
        self._clients: list[MemoryTransport] = []
        self._late: list[tuple[MemoryTransport, Message]] = []

    def stop(self) -> None:
        """Cut everyone off and forget everything, like a broker without persistence."""
        self._up.clear()
        self._retained.clear()
        self._late.clear()
        for client in self._clients:
            client.cut()

    def start(self) -> None:
        self._up.set()

    async def wait_up(self) -> None:
        await self._up.wait()

    def join(self, client: MemoryTransport) -> None:
        self._clients.append(client)
        for message in self._retained.values():
            if client.wants(message.topic):
                self._deliver(client, message)

    def leave(self, client: MemoryTransport) -> None:
        self._clients.remove(client)

    def publish(self, message: Message, *, retain: bool) -> None:
        self.seen.append(message)
        if retain:
            self._retained[message.topic] = message
        for client in list(self._clients):
            if client.wants(message.topic):
                self._deliver(client, message)

    def _deliver(self, client: MemoryTransport, message: Message) -> None:
        copies, late = self.faults.apply(message, self._rng)
        if late:
            self._late += [(client, copy) for copy in copies]
            return
        for copy in copies:
            client.arrive(copy)
        for overtaken, copy in self._late:
            overtaken.arrive(copy)
        self._late.clear()


class MemoryTransport:
    """One client of a `MemoryBroker`; a `Transport`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._filters: list[str] = []
        self._queue = EventQueue()
        self._traffic = TrafficTally()
        self._down = asyncio.Event()
        self._connected = False

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def status(self) -> str:
        return "memory broker: " + ("connected" if self._connected else "stopped")

    @property
    def path(self) -> str:
        return "memory" if self._connected else ""

    @property
    def traffic(self) -> Traffic:
        return self._traffic.snapshot() + self._queue.traffic

    def subscribe(self, topic_filter: str) -> None:
        self._filters.append(topic_filter)

    def wants(self, topic: str) -> bool:
        return any(matches(topic_filter, topic) for topic_filter in self._filters)

    def arrive(self, message: Message) -> None:
        if self._connected:
            self._queue.put(message)

    def cut(self) -> None:
        self._connected = False
        self._down.set()

    async def run(self) -> None:
        while True:
            await self._broker.wait_up()
            self._down.clear()
            self._connected = True
            self._traffic.connected()
            self._queue.put(Connected())
            self._broker.join(self)
            try:
                await self._down.wait()
                self._traffic.add("connections_lost")
            finally:
                self._connected = False
                self._broker.leave(self)
                self._queue.put(Disconnected())

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if not self._connected:
            raise UnavailableError(self.status)
        self._traffic.add("sent_bytes", len(payload))
        self._broker.publish(Message(topic, payload), retain=retain)

    def events(self) -> AsyncIterator[TransportEvent]:
        return self._queue.events()
