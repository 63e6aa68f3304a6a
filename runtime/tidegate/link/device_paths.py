"""A device's two paths as one `Transport`: the broker, and HTTP while the broker is of no use.

Whatever comes is taken, from either. What goes takes the path that `path_choice` names; a change
of it is told as a new connection, so that every request under way is sent again there, under a new
attempt, and its answer goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from tidegate.errors import UnavailableError
from tidegate.link.path_choice import PathChoice, PathTiming, Use
from tidegate.link.traffic import Traffic
from tidegate.link.transport import (
    Connected,
    Disconnected,
    EventQueue,
    Message,
    Transport,
    TransportEvent,
)

logger = logging.getLogger(__name__)


class DevicePaths:
    """The broker and HTTP, in one.

    Args:
        broker: the first path; always trying.
        http: the second; it runs only while it is wanted.
        timing: when to change.
    """

    def __init__(
        self, broker: Transport, http: Transport, *, timing: PathTiming | None = None
    ) -> None:
        self._broker, self._http = broker, http
        self._choice = PathChoice(timing or PathTiming(), now_s=time.monotonic())
        self._queue = EventQueue()
        self._changed = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._last: Use = "none"
        self.changes = 0
        """How often the path has changed from one to the other."""

    @property
    def connected(self) -> bool:
        return self._choice.use != "none"

    @property
    def status(self) -> str:
        if not self._http.status:
            return self._broker.status
        used = {"broker": "the broker", "http": "http", "none": "no path"}[self._choice.use]
        waits = "" if self._running is not None else " (waits)"
        return f"{self._broker.status}; {self._http.status}{waits}; using {used}"

    @property
    def path(self) -> str:
        return {"broker": self._broker.path, "http": "http", "none": ""}[self._choice.use]

    @property
    def traffic(self) -> Traffic:
        own = Traffic(overflowed=self._queue.dropped)
        return self._broker.traffic + self._http.traffic + own

    def subscribe(self, topic_filter: str) -> None:
        self._broker.subscribe(topic_filter)
        self._http.subscribe(topic_filter)

    def events(self) -> AsyncIterator[TransportEvent]:
        return self._queue.events()

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send on the path that is used now.

        Raises:
            UnavailableError: there is none. Nothing was queued.
        """
        if self._choice.use == "none":
            raise UnavailableError(self.status)
        way = self._http if self._choice.use == "http" else self._broker
        await way.publish(topic, payload, retain=retain)

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._broker.run())
                tasks.create_task(self._pump_broker())
                tasks.create_task(self._pump_http())
                tasks.create_task(self._keep_time())
        finally:
            await self._stop_http()

    async def _pump_broker(self) -> None:
        async for event in self._broker.events():
            now_s = time.monotonic()
            match event:
                case Message(retained=retained):
                    self._choice.broker_heard(now_s, retained=retained)
                    self._queue.put(event)
                case Connected():
                    self._choice.broker_up(now_s)
                    self._decide(fresh="broker")
                case Disconnected():
                    self._choice.broker_down(now_s)
                    self._decide()

    async def _pump_http(self) -> None:
        async for event in self._http.events():
            match event:
                case Message():
                    self._queue.put(event)
                case Connected() if self._http.connected:
                    self._choice.http_up()
                    self._decide(fresh="http")
                case _:
                    self._choice.http_down()
                    self._decide()

    def _decide(self, *, fresh: str = "") -> None:
        """Choose; `fresh` is a path whose connection is a new one."""
        before = self._choice.use
        now = self._choice.poll(time.monotonic())
        self._changed.set()
        if now == before and now != fresh:
            return
        if now == "none":
            self._queue.put(Disconnected())
            return
        if before != now:
            logger.info("the link uses %s", "http" if now == "http" else "the broker")
            self.changes += self._last not in ("none", now)
            self._last = now
        self._queue.put(Connected())

    async def _keep_time(self) -> None:
        while True:
            self._decide()
            self._changed.clear()
            now_s = time.monotonic()
            wanted = self._choice.wants_http(now_s)
            if wanted and self._running is None:
                self._running = asyncio.create_task(self._http.run())
                self._running.add_done_callback(lambda _: self._changed.set())
            elif not wanted and self._running is not None:
                await self._stop_http()
            if self._running is not None and self._running.done():
                self._running.result()  # it only ends by an error of ours
            with suppress(TimeoutError):
                async with asyncio.timeout(self._choice.next_wakeup_s(now_s) - now_s):
                    await self._changed.wait()

    async def _stop_http(self) -> None:
        task, self._running = self._running, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._choice.http_down()
