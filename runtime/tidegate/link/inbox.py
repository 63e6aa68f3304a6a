"""What has happened since a core last had its turn, and what wakes the shell that gives it one.

A core works in a thread of its own. Whatever arrives while it does waits here and is taken in one
go, so that one hop to the thread, one transaction and one look at the clock serve all of it: the
busier an end is, the less each message costs.
"""

from __future__ import annotations

import asyncio

from tidegate.link.transport import TransportEvent

MOST_EVENTS = 1024
"""Beyond this, what arrives waits in the transport's own queue, which is bounded and drops."""


class Inbox:
    """Events in order, and one alarm."""

    def __init__(self) -> None:
        self._events: list[TransportEvent] = []
        self._alarm = asyncio.Event()
        self._taken = asyncio.Event()

    def ring(self) -> None:
        """There is something to do."""
        self._alarm.set()

    async def put(self, event: TransportEvent) -> None:
        """One more event; waits while there are too many."""
        while len(self._events) >= MOST_EVENTS:
            self._taken.clear()
            await self._taken.wait()
        self._events.append(event)
        self._alarm.set()

    def take(self) -> list[TransportEvent]:
        """All that has arrived. What rings from now on is heard by the next `wait`."""
        self._alarm.clear()
        events, self._events = self._events, []
        self._taken.set()
        return events

    async def wait(self, timeout_s: float) -> None:
        """Until it rings, or so long."""
        if self._alarm.is_set():
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._alarm.wait()
        except TimeoutError:
            return
