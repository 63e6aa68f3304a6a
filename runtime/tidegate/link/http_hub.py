"""The gateway's end of HTTP as a `Transport`: a small broker in memory, for its own devices only.

Each device has one stream; a newer one ends the older. What a device does not take in time is
dropped by bytes, as any broker may lose it: the session sends it again. The routes of an HTTP
server feed it (`tidegate.cloud.link_http`); it knows no HTTP itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from tidegate.errors import CapacityError, UnavailableError
from tidegate.link.http_frames import Frame, Kind
from tidegate.link.http_stream import DeviceStream, HubLimits, Waiting
from tidegate.link.topics import GONE, Topics, last_level
from tidegate.link.traffic import Traffic, TrafficTally
from tidegate.link.transport import Connected, EventQueue, Message, TransportEvent

GOODBYE_S = 1.0
"""How long a gateway that stops lets its devices take what is ready for them."""

Part = Callable[[], Coroutine[Any, Any, None]]


class HttpHub:
    """A `Transport` over whichever devices have a stream open.

    Args:
        group: of the gateway.
        gateway_id: whose requests may be sent here.
        limits: bounds on devices and memory.
    """

    def __init__(self, group: str, gateway_id: str, *, limits: HubLimits | None = None) -> None:
        self.topics = Topics(group)
        self.gateway_id = gateway_id
        self._limits = limits or HubLimits()
        self._waiting = Waiting()
        self._streams: dict[str, DeviceStream] = {}
        self._by_challenge: dict[bytes, DeviceStream] = {}
        self._leaving: set[DeviceStream] = set()
        self._advert: bytes | None = None
        self._queue = EventQueue()
        self._traffic = TrafficTally()
        self._parts: list[Part] = []
        self._running = False
        self.lost = 0
        """Messages for devices that did not take them in time."""

    @property
    def connected(self) -> bool:
        """Devices may come."""
        return self._running

    @property
    def status(self) -> str:
        return f"http: {len(self._streams)} devices" if self._running else "http: not serving"

    @property
    def path(self) -> str:
        return "http" if self._running else ""

    @property
    def traffic(self) -> Traffic:
        return self._traffic.snapshot(overflowed=self.lost) + self._queue.traffic

    @property
    def waiting_bytes(self) -> int:
        """Of all devices together."""
        return self._waiting.all_bytes

    @property
    def handles(self) -> tuple[str, ...]:
        """Of the devices that have a stream open."""
        return tuple(self._streams)

    def has(self, handle: str) -> bool:
        """The device has a stream open."""
        return handle in self._streams

    def subscribe(self, topic_filter: str) -> None:
        """What comes here is for this gateway: there is nothing to choose from."""

    def events(self) -> AsyncIterator[TransportEvent]:
        return self._queue.events()

    def serve_with(self, part: Part) -> None:
        """Run `part` as long as devices are taken, and until they were told goodbye."""
        self._parts.append(part)

    async def run(self) -> None:
        """Take devices until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for part in self._parts:
                tasks.create_task(part())
            self._running = True
            self._queue.put(Connected())
            try:
                await asyncio.Event().wait()
            finally:
                self._running = False
                self.end(self.handles, "gateway_stops", keep=True)
                await self._goodbyes()

    async def _goodbyes(self) -> None:
        try:
            async with asyncio.timeout(GOODBYE_S):
                while self._leaving:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return

    def open(self, handle: str, challenge: bytes) -> DeviceStream:
        """A device has proved who it is: its stream, which begins with a beat and the advert.

        Raises:
            CapacityError: there are too many devices.
            UnavailableError: the gateway is not running.
        """
        if not self._running:
            raise UnavailableError("http: the gateway is not running")
        if handle not in self._streams and len(self._streams) >= self._limits.most_devices:
            raise CapacityError("http: too many devices")
        self.end([handle], "replaced")
        stream = DeviceStream(handle, challenge, self._waiting)
        self._streams[handle] = self._by_challenge[challenge] = stream
        stream.put(Frame(Kind.BEAT).encode())
        if self._advert is not None:
            stream.put(self._advert)
        return stream

    def close(self, stream: DeviceStream) -> None:
        """Its connection has ended; called for every stream that was opened.

        The sessions of a device that left of itself hear of it, as its broker's will has them hear:
        it may be on its way to the broker, so this is a hint, and a word of the device undoes it.
        """
        if self._running and self._streams.get(stream.handle) is stream:
            self._queue.put(Message(self.topics.presence(stream.handle), GONE))
        stream.end("", keep=False)
        self._leaving.discard(stream)
        self._forget(stream)

    def end(self, handles: Iterable[str], code: str, *, keep: bool = False) -> None:
        """End the streams of `handles`; each is told `code`, after what waits if that is kept."""
        for handle in handles:
            stream = self._streams.get(handle)
            if stream is not None:
                stream.end(code, keep=keep)
                self._leaving.add(stream)
                self._forget(stream)

    def _forget(self, stream: DeviceStream) -> None:
        self._by_challenge.pop(stream.challenge, None)
        if self._streams.get(stream.handle) is stream:
            del self._streams[stream.handle]

    def find(self, challenge: bytes) -> DeviceStream | None:
        """The open stream that `challenge` opened."""
        return self._by_challenge.get(challenge)

    def receive(self, stream: DeviceStream, message: bytes) -> None:
        """A device sent `message`: as if it had come on its topic."""
        topic = self.topics.request(self.gateway_id, stream.handle)
        self._queue.put(Message(topic, message))

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """An advert goes to everyone, now and whoever comes; an answer to its device.

        Raises:
            UnavailableError: the device has no stream open. Nothing was queued.
        """
        if self.topics.is_advert(topic):
            self._advert = Frame(Kind.ADVERT, payload).encode()
            for stream in self._streams.values():
                self._offer(stream, self._advert, len(payload))
            return
        found = self._streams.get(last_level(topic))
        if found is None or topic != self.topics.response(found.handle):
            raise UnavailableError("http: this device has no stream open")
        self._offer(found, Frame(Kind.MESSAGE, payload).encode(), len(payload))

    def _offer(self, stream: DeviceStream, frame: bytes, payload_bytes: int) -> None:
        full = stream.waiting_bytes + len(frame) > self._limits.device_bytes
        if full or self._waiting.all_bytes + len(frame) > self._limits.all_bytes:
            self.lost += 1
            return
        self._traffic.add("sent_bytes", payload_bytes)
        stream.put(frame)
