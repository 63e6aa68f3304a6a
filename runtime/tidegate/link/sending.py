"""Messages on their way from a core to its transport: bounded, and felt by whoever makes them.

A broker that takes messages slowly must slow the engine down and not fill memory: the gateway asks
for `room` before it takes what its handlers have yielded, and they wait in turn.
"""

from __future__ import annotations

import asyncio

from tidegate.errors import UnavailableError
from tidegate.link.counters import Tally
from tidegate.link.effects import Publish
from tidegate.link.transport import Transport

PAUSE_BYTES = 4 * 1024 * 1024
"""With more than this waiting nothing new is produced: seconds of a slow uplink."""
MOST_BYTES = 64 * 1024 * 1024
"""Beyond this a message is dropped and counted as one that could not be published: the protocol
sends it again. Acknowledgements and signs of life cannot be paused, so there has to be an end."""
DRAIN_S = 2.0
"""How long an end that stops waits for what it has ready to be taken by the broker."""


class Outgoing:
    """A queue in front of a transport; `run` empties it."""

    def __init__(self, transport: Transport, tally: Tally) -> None:
        self._transport = transport
        self._tally = tally
        self._queue: asyncio.Queue[Publish] = asyncio.Queue()
        self._waiting_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def waiting_bytes(self) -> int:
        return self._waiting_bytes

    def put(self, message: Publish) -> None:
        """Take a message on its way; see `MOST_BYTES`."""
        if self._waiting_bytes + len(message.payload) > MOST_BYTES:
            self._tally.add("publish_failures")
            return
        self._waiting_bytes += len(message.payload)
        if self._waiting_bytes > PAUSE_BYTES:
            self._has_room.clear()
        self._empty.clear()
        self._queue.put_nowait(message)

    async def room(self) -> None:
        """Wait until no more than `PAUSE_BYTES` are waiting."""
        await self._has_room.wait()

    async def run(self) -> None:
        """Publish one after another until cancelled; what fails is counted."""
        while True:
            message = await self._queue.get()
            try:
                await self._transport.publish(message.topic, message.payload, retain=message.retain)
            except UnavailableError:
                self._tally.add("publish_failures")
            self._waiting_bytes -= len(message.payload)
            if self._waiting_bytes <= PAUSE_BYTES:
                self._has_room.set()
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
