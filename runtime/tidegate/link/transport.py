"""What the link needs from a message broker: less than any broker promises.

A transport may lose, repeat and reorder messages and may be away for hours. It must keep trying
to connect while `run` runs, and report `Connected` only once its subscriptions stand.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from tidegate.link.traffic import Traffic
from tidegate.link.wire import MAX_MESSAGE_BYTES

PATHS = ("mqtt", "http")
"""What `Transport.path` may name in production, as metrics label it."""
QUEUE_EVENTS = 4096
"""Events a transport holds for a slow consumer; messages beyond it are dropped and counted."""
QUEUE_BYTES = 64 * 1024 * 1024
"""All payloads among them together."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker answers and every filter is subscribed."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The broker is gone; the transport is trying again."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message that arrived."""

    topic: str
    payload: bytes = field(repr=False)
    retained: bool = field(default=False, compare=False)
    """The broker kept it for us; it may be old."""


TransportEvent = Connected | Disconnected | Message


class Transport(Protocol):
    """The contract between the link and what carries it."""

    @property
    def connected(self) -> bool: ...

    @property
    def status(self) -> str:
        """One line for people: where the broker is and what is wrong, without secrets."""
        ...

    @property
    def path(self) -> str:
        """What carries messages now: `mqtt`, `http`, or empty when nothing does."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What it has carried, what it threw away (see `EventQueue`), and why it failed."""
        ...

    def subscribe(self, topic_filter: str) -> None:
        """Ask for messages on `topic_filter` from the next connection on. Call before `run`."""
        ...

    async def run(self) -> None:
        """Connect, stay connected, until cancelled."""
        ...

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send at QoS 1; waits for room in the window.

        Raises:
            UnavailableError: not connected. Nothing was queued.
        """
        ...

    def events(self) -> AsyncIterator[TransportEvent]:
        """Everything that happens, in order. One consumer."""
        ...


class EventQueue:
    """The queue behind `Transport.events`, bounded in events and bytes.

    Messages beyond the bounds, or larger than anything legal, are dropped; connection changes
    never are.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[TransportEvent] = asyncio.Queue()
        self._held_bytes = 0
        self.dropped = 0
        self.received_bytes = 0

    @property
    def traffic(self) -> Traffic:
        """What came in; for the queue of a transport that feeds no other."""
        return Traffic(received_bytes=self.received_bytes, overflowed=self.dropped)

    def put(self, event: TransportEvent) -> None:
        if isinstance(event, Message):
            size_bytes = len(event.payload)
            self.received_bytes += size_bytes
            if (
                size_bytes > MAX_MESSAGE_BYTES
                or self._held_bytes + size_bytes > QUEUE_BYTES
                or self._queue.qsize() >= QUEUE_EVENTS
            ):
                self.dropped += 1
                return
            self._held_bytes += size_bytes
        self._queue.put_nowait(event)

    def take_all(self) -> list[TransportEvent]:
        """Everything that waits, without waiting."""
        return [self._taken(self._queue.get_nowait()) for _ in range(self._queue.qsize())]

    async def events(self) -> AsyncIterator[TransportEvent]:
        while True:
            yield self._taken(await self._queue.get())

    def _taken(self, event: TransportEvent) -> TransportEvent:
        if isinstance(event, Message):
            self._held_bytes -= len(event.payload)
        return event
