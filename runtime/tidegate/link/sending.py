"""Messages on their way from a core to its transport: bounded, and felt by whoever makes them.

A broker that takes messages slowly must slow the engine down and not fill memory, and must not make
what it gets old: a core seals nothing more while enough is waiting. What a session holds back can
still join other payloads in one message, or turn out not to be needed; what is sealed cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tidegate.errors import UnavailableError
from tidegate.link.counters import Tally
from tidegate.link.effects import Publish
from tidegate.link.transport import Transport

PAUSE_BYTES = 256 * 1024
"""With more than this waiting nothing more is sealed: two seconds of 1 Mbit/s."""
PAUSE_MESSAGES = 256
"""The same for small ones, of which each costs a broker's round trip."""
MOST_BYTES = 64 * 1024 * 1024
"""Beyond this a message is dropped and counted as one that could not be published: the protocol
sends it again. A peer's own requests bring it no further than this."""
DRAIN_S = 2.0
"""How long an end that stops waits for what it has ready to be taken by the broker."""


class Outgoing:
    """A queue in front of a transport; `run` empties it.

    Args:
        transport: takes one message after another.
        tally: counts what could not be published.
        on_room: called when there is room again.
    """

    def __init__(
        self, transport: Transport, tally: Tally, *, on_room: Callable[[], None] = lambda: None
    ) -> None:
        self._transport = transport
        self._tally = tally
        self._on_room = on_room
        self._queue: asyncio.Queue[Publish] = asyncio.Queue()
        self._waiting_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def waiting_bytes(self) -> int:
        return self._waiting_bytes

    @property
    def room_bytes(self) -> int:
        """What may be sealed now; nothing from a pause on until half of it has left."""
        return PAUSE_BYTES - self._waiting_bytes if self._has_room.is_set() else 0

    async def room(self) -> None:
        """Wait until something may be sealed."""
        await self._has_room.wait()

    def put(self, message: Publish) -> None:
        """Take a message on its way; see `MOST_BYTES`."""
        if self._waiting_bytes + len(message.payload) > MOST_BYTES:
            self._tally.add("publish_failures")
            return
        self._waiting_bytes += len(message.payload)
        self._empty.clear()
        self._queue.put_nowait(message)
        if self._waiting_bytes >= PAUSE_BYTES or self._queue.qsize() >= PAUSE_MESSAGES:
            self._has_room.clear()

    async def run(self) -> None:
        """Publish one after another until cancelled; what fails is counted."""
        while True:
            message = await self._queue.get()
            try:
                await self._transport.publish(message.topic, message.payload, retain=message.retain)
            except UnavailableError:
                self._tally.add("publish_failures")
            self._waiting_bytes -= len(message.payload)
            few = self._queue.qsize() <= PAUSE_MESSAGES // 2
            if few and self._waiting_bytes <= PAUSE_BYTES // 2 and not self._has_room.is_set():
                self._has_room.set()
                self._on_room()
            if self._queue.empty():
                self._empty.set()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until everything has been handed over, at most so long; False if not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
