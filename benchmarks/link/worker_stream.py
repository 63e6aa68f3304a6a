"""Streams of stamped chunks, for `cost.py`: `worker_stream.py cloud|reader SETTINGS`.

A chunk carries the moment for which it was due, on the machine's monotonic clock, so a lag counts
whatever is late for whatever reason. The cloud answers over the link and, on plain topics, over
the same transport without the link in between.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest
from tidegate.link.gateway import Gateway
from tidegate.link.mqtt import MqttTransport
from tidegate.link.timing import Timing
from tidegate.link.transport import Connected, Message

_STAMP = struct.Struct(">d")
CHUNK_BYTES = 60
"""About one token's event as JSON."""
ASK, SAY = "plain/ask", "plain/say"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What a request asks for; `rate` 0 is as fast as it goes."""

    chunks: int
    rate: float

    def body(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def timing(settings: dict[str, Any]) -> Timing:
    return Timing(tick_s=settings["tick_s"])


async def stamped(stream: Stream) -> AsyncIterator[bytes]:
    """The chunks, each at its time."""
    began_s = time.monotonic()
    for number in range(stream.chunks):
        due_s = began_s + number / stream.rate if stream.rate else time.monotonic()
        wait_s = due_s - time.monotonic()
        await asyncio.sleep(max(0.0, wait_s))
        yield _STAMP.pack(due_s).ljust(CHUNK_BYTES, b"x")


async def cloud(settings: dict[str, Any]) -> None:
    """A gateway, and beside it the same streams without one."""

    async def answer(request: InboundRequest) -> AsyncIterator[bytes]:
        async for chunk in stamped(Stream(**json.loads(request.body))):
            yield chunk

    gateway = Gateway(
        Path(settings["gateway"]),
        MqttTransport(settings["url"]),
        answer,
        max_requests=settings["places"],
        timing=timing(settings),
    )
    plain = MqttTransport(settings["url"])
    plain.subscribe(ASK)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(gateway.run())
        tasks.create_task(plain.run())
        async for event in plain.events():
            if isinstance(event, Message):
                async for chunk in stamped(Stream(**json.loads(event.payload))):
                    await plain.publish(SAY, chunk)


Read = Callable[[Stream], AsyncIterator[bytes]]


async def lags_of(source: AsyncIterator[bytes]) -> list[float]:
    """Seconds by which each chunk came after it was due."""
    return [time.monotonic() - _STAMP.unpack_from(chunk)[0] async for chunk in source]


class Plain:
    """Asks on a plain topic."""

    def __init__(self, url: str) -> None:
        self._transport = MqttTransport(url)
        self._transport.subscribe(SAY)
        self._events = self._transport.events()

    async def run(self) -> None:
        await self._transport.run()

    async def ready(self) -> None:
        while not isinstance(await anext(self._events), Connected):
            pass

    async def read(self, stream: Stream) -> AsyncIterator[bytes]:
        await self._transport.publish(ASK, stream.body())
        for _ in range(stream.chunks):
            event = await anext(self._events)
            assert isinstance(event, Message), "the broker stays"
            yield event.payload


async def latency(settings: dict[str, Any], devices: list[DeviceLink]) -> object:
    """One stream at a time, over the link and plain by turns; lags by way."""
    stream = Stream(chunks=settings["chunks"], rate=settings["rate"])
    plain = Plain(settings["url"])
    running = asyncio.create_task(plain.run())
    await plain.ready()
    lags: dict[str, list[float]] = {"link": [], "plain": []}
    for _ in range(settings["rounds"]):
        source = devices[0].request(stream.body(), deadline_s=600)
        lags["link"] += (await lags_of(source))[1:]
        lags["plain"] += (await lags_of(plain.read(stream)))[1:]
    running.cancel()
    await asyncio.wait([running])
    return lags


async def streams(settings: dict[str, Any], devices: list[DeviceLink]) -> object:
    """Many streams at once, spread over the devices."""
    stream = Stream(chunks=settings["chunks"], rate=settings["rate"])

    async def one(number: int) -> list[float]:
        # Not all in the same instant: each has its own place in the beat of chunks.
        await asyncio.sleep(number / settings["streams"])
        device = devices[number % len(devices)]
        return await lags_of(device.request(stream.body(), deadline_s=600))

    return await asyncio.gather(*(one(number) for number in range(settings["streams"])))


async def traffic(settings: dict[str, Any], devices: list[DeviceLink]) -> object:
    """So many requests, some at a time; tells how many are through as it goes."""
    stream = Stream(chunks=settings["chunks"], rate=settings["rate"])
    numbers = iter(range(settings["requests"]))
    missing = done = 0

    async def each() -> None:
        nonlocal missing, done
        for _ in numbers:
            got = await lags_of(devices[0].request(stream.body(), deadline_s=600))
            missing += stream.chunks - len(got)
            done += 1
            print(json.dumps({"done": done}), flush=True)

    await asyncio.gather(*(each() for _ in range(settings["together"])))
    return missing


TASKS: dict[str, Callable[[dict[str, Any], list[DeviceLink]], Awaitable[object]]] = {
    "latency": latency,
    "streams": streams,
    "traffic": traffic,
}


async def reader(settings: dict[str, Any]) -> None:
    """The devices. Says {"ready": true} once it hears the gateway, and last {"result": ...}."""
    devices = [
        DeviceLink(Path(folder), MqttTransport(settings["url"]), timing=timing(settings))
        for folder in settings["devices"]
    ]
    running = [asyncio.create_task(device.run()) for device in devices]
    async with asyncio.timeout(30):
        for device in devices:
            while not await device.gateways():
                await asyncio.sleep(0.05)
    print(json.dumps({"ready": True}), flush=True)
    result = await TASKS[settings["task"]](settings, devices)
    print(json.dumps({"result": result}), flush=True)
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    for device in devices:
        await device.close()


if __name__ == "__main__":
    told = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    asyncio.run((cloud if sys.argv[1] == "cloud" else reader)(told))
