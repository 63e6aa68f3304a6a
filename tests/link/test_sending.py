"""The queue in front of a transport: what a slow broker holds up, and what it cannot make grow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path

from linklab import FAST

from tidegate.link.counters import Tally
from tidegate.link.device import DeviceLink
from tidegate.link.effects import InboundRequest, Publish
from tidegate.link.fleet import pair
from tidegate.link.gateway import UNSENT_PAYLOADS, Gateway
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.sending import MOST_BYTES, PAUSE_BYTES, PAUSE_MESSAGES, Outgoing


class SlowTransport(MemoryTransport):
    """Takes a message only while `flowing`."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self.flowing = asyncio.Event()
        self.taken: list[bytes] = []

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        await self.flowing.wait()
        self.taken.append(payload)
        await super().publish(topic, payload, retain=retain)


def message(nbytes: int) -> Publish:
    return Publish(topic="t", payload=bytes(nbytes))


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_room_is_there_again_once_half_of_what_waits_has_left() -> None:
    async def main() -> None:
        rings: list[int] = []
        transport = SlowTransport(MemoryBroker())
        outgoing = Outgoing(transport, Tally(), on_room=lambda: rings.append(outgoing.room_bytes))
        assert outgoing.room_bytes == PAUSE_BYTES
        for _ in range(8):
            outgoing.put(message(PAUSE_BYTES // 8))
        assert outgoing.room_bytes == 0
        task = asyncio.create_task(outgoing.run())
        await asyncio.sleep(0.05)
        assert not rings
        transport.flowing.set()
        assert await outgoing.drain(5)
        assert rings == [PAUSE_BYTES // 2]
        assert outgoing.waiting_bytes == 0
        assert outgoing.room_bytes == PAUSE_BYTES
        task.cancel()
        await asyncio.wait([task])

    run(main)


def test_many_small_messages_that_wait_leave_no_room_either() -> None:
    outgoing = Outgoing(SlowTransport(MemoryBroker()), Tally())
    for _ in range(PAUSE_MESSAGES - 1):
        outgoing.put(message(1))
    assert outgoing.room_bytes > 0
    outgoing.put(message(1))
    assert outgoing.room_bytes == 0


def test_what_cannot_be_paused_is_dropped_in_the_end_and_counted() -> None:
    async def main() -> None:
        tally = Tally()
        outgoing = Outgoing(SlowTransport(MemoryBroker()), tally)
        for _ in range(100):
            outgoing.put(message(MOST_BYTES // 50))
        assert outgoing.waiting_bytes <= MOST_BYTES
        assert tally.snapshot().publish_failures == 50

    run(main)


def test_a_drain_ends_when_its_time_is_over() -> None:
    async def main() -> None:
        outgoing = Outgoing(SlowTransport(MemoryBroker()), Tally())
        outgoing.put(message(1))
        assert not await outgoing.drain(0.05)

    run(main)


async def endless(request: InboundRequest) -> AsyncIterator[bytes]:
    while True:
        endless.yielded += 1  # type: ignore[attr-defined]
        yield bytes(60_000)


def test_a_slow_broker_stops_the_engine_and_memory_stays_where_it_is(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")
    # What a device asks for again comes on top, more often the busier the machine: not here.
    patient = replace(FAST, silence_s=4.0, resend_min_s=4.0, resend_max_s=4.0)
    endless.yielded = 0  # type: ignore[attr-defined]

    def yielded() -> int:
        return endless.yielded  # type: ignore[attr-defined, no-any-return]

    async def main() -> None:
        broker = MemoryBroker()
        slow = SlowTransport(broker)
        slow.flowing.set()
        gateway = Gateway(tmp_path / "gateway", slow, endless, timing=patient)
        device = DeviceLink(tmp_path / "device", MemoryTransport(broker), timing=patient)
        tasks = [asyncio.create_task(gateway.run()), asyncio.create_task(device.run())]
        while not await device.gateways():
            await asyncio.sleep(0.01)
        slow.flowing.clear()
        answer = device.request(b"prompt", deadline_s=15)
        reading = asyncio.create_task(anext(answer))
        await until(lambda: yielded() > 0)
        await asyncio.sleep(0.5)
        before = yielded()
        await asyncio.sleep(0.5)
        assert yielded() - before <= FAST.credit, "it has stopped, but for what was asked again"
        assert yielded() <= 2 * UNSENT_PAYLOADS
        assert gateway._outgoing.waiting_bytes < 2 * PAUSE_BYTES
        slow.flowing.set()
        assert await reading
        await answer.aclose()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await gateway.close()
        await device.close()

    run(main)


def test_an_end_that_stops_sends_what_it_has_ready(tmp_path: Path) -> None:
    pair(tmp_path / "device", tmp_path / "gateway")

    async def main() -> None:
        slow = SlowTransport(MemoryBroker())
        gateway = Gateway(tmp_path / "gateway", slow, endless, timing=FAST)
        task = asyncio.create_task(gateway.run())
        await until(lambda: gateway._outgoing.waiting_bytes > 0)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        slow.flowing.set()
        await asyncio.wait([task])
        assert slow.taken, "its advert"
        await gateway.close()

    run(main)
