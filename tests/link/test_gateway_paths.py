"""Where a gateway sends an answer: over HTTP while its device reads there, and nowhere too few."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from linkhttp import running, until

from tidegate.errors import UnavailableError
from tidegate.link.gateway_paths import GatewayPaths
from tidegate.link.http_frames import Frame, Kind, split
from tidegate.link.http_hub import HttpHub
from tidegate.link.http_stream import DeviceStream
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.sending import PAUSE_MESSAGES
from tidegate.link.topics import Topics
from tidegate.link.transport import Message

TOPICS = Topics("home")
HANDLE, OTHER = "a" * 32, "b" * 32


class HangingTransport(MemoryTransport):
    """Takes nothing and says nothing, like a broker that is stopped in its tracks."""

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        await asyncio.Event().wait()


@dataclass(frozen=True, kw_only=True)
class Place:
    broker: MemoryBroker
    hub: HttpHub
    paths: GatewayPaths

    def on_broker(self, topic: str) -> list[bytes]:
        return [message.payload for message in self.broker.seen if message.topic == topic]

    async def answer(self, payload: bytes, handle: str = HANDLE) -> None:
        await self.paths.publish(TOPICS.response(handle), payload)
        await asyncio.sleep(0.02)

    async def ask_by_broker(self, handle: str = HANDLE) -> None:
        self.broker.publish(Message(TOPICS.request("gw0", handle), b"ask"), retain=False)
        await asyncio.sleep(0.02)


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 20))


@asynccontextmanager
async def place(kind: type[MemoryTransport] = MemoryTransport) -> AsyncIterator[Place]:
    broker, hub = MemoryBroker(), HttpHub("home", "gw0")
    transport = kind(broker)
    paths = GatewayPaths(transport, hub)
    paths.subscribe(TOPICS.every_request("gw0"))
    async with running(paths.run):
        await until(lambda: transport.connected and hub.connected, "both are up")
        yield Place(broker=broker, hub=hub, paths=paths)


async def taken(stream: DeviceStream) -> list[bytes]:
    """The messages that wait for a device now."""
    frames: list[Frame] = []
    while stream.waiting_bytes:
        frames += split(await stream.take(0.01))
    return [frame.data for frame in frames if frame.kind is Kind.MESSAGE]


def test_without_a_stream_answers_go_to_the_broker_and_with_one_they_do_not() -> None:
    async def main() -> None:
        async with place() as at:
            await at.answer(b"1")
            stream = at.hub.open(HANDLE, b"c")
            await at.answer(b"2")
            await at.answer(b"other", OTHER)
            assert await taken(stream) == [b"2"]
            at.hub.close(stream)
            await at.answer(b"3")
            assert at.on_broker(TOPICS.response(HANDLE)) == [b"1", b"3"]
            assert at.on_broker(TOPICS.response(OTHER)) == [b"other"]

    run(main)


def test_a_device_that_is_heard_through_the_broker_again_is_answered_on_both() -> None:
    async def main() -> None:
        async with place() as at:
            stream = at.hub.open(HANDLE, b"c")
            await at.ask_by_broker(OTHER)
            await at.answer(b"1")
            await at.ask_by_broker()
            await at.answer(b"2")
            at.hub.receive(stream, b"ask")
            await asyncio.sleep(0.02)
            await at.answer(b"3")
            assert await taken(stream) == [b"1", b"2", b"3"], "no forger takes an answer away"
            assert at.on_broker(TOPICS.response(HANDLE)) == [b"2"]
            await at.ask_by_broker()
            at.hub.close(stream)
            again = at.hub.open(OTHER, b"d")
            await at.answer(b"4")
            assert at.on_broker(TOPICS.response(HANDLE)) == [b"2", b"4"]
            at.hub.close(again)

    run(main)


def test_adverts_go_to_both_and_wait_for_who_comes_over_http() -> None:
    async def main() -> None:
        async with place() as at:
            await at.paths.publish(TOPICS.advert("gw0"), b"advert", retain=True)
            await asyncio.sleep(0.02)
            stream = at.hub.open(HANDLE, b"c")
            assert Frame(Kind.ADVERT, b"advert") in split(await stream.take())
            assert at.on_broker(TOPICS.advert("gw0")) == [b"advert"]
            at.hub.close(stream)

    run(main)


def test_a_broker_that_hangs_does_not_hold_up_who_comes_over_http() -> None:
    async def main() -> None:
        async with place(HangingTransport) as at:
            stream = at.hub.open(HANDLE, b"c")
            async with asyncio.timeout(5):
                # More than may wait for a broker before whoever makes it is told to wait.
                for _ in range(PAUSE_MESSAGES + 1):
                    await at.paths.publish(TOPICS.response(OTHER), bytes(1000))
                await at.answer(b"1")
            assert await taken(stream) == [b"1"]
            at.hub.close(stream)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await at.paths.publish(TOPICS.response(OTHER), b"nobody reads over HTTP")

    run(main)


def test_what_a_broker_no_longer_takes_is_counted() -> None:
    async def main() -> None:
        async with place() as at:
            await at.paths.publish(TOPICS.response(OTHER), b"1")
            at.broker.stop()
            await until(lambda: at.paths.traffic.overflowed == 1, "it is counted")

    run(main)


def test_what_nobody_can_be_reached_for_is_told() -> None:
    async def main() -> None:
        async with place() as at:
            at.broker.stop()
            await until(lambda: at.paths.path == "http", "the broker is gone")
            assert at.paths.connected
            await at.paths.publish(TOPICS.advert("gw0"), b"advert", retain=True)
            with pytest.raises(UnavailableError):
                await at.paths.publish(TOPICS.response(HANDLE), b"1")

    run(main)


def test_nothing_of_another_devices_answer_reaches_a_stream() -> None:
    async def main() -> None:
        async with place() as at:
            stream = at.hub.open(HANDLE, b"c")
            for topic in (TOPICS.response(OTHER), TOPICS.presence(HANDLE), f"x/{HANDLE}"):
                with pytest.raises(UnavailableError):
                    await at.hub.publish(topic, b"secret")
            assert await taken(stream) == []
            at.hub.close(stream)

    run(main)
