"""Both ends on two paths at once: a request survives every change from one to the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from linkhttp import QUICK, BothWays, both_ways, until, whole

from tidegate.link.effects import InboundRequest
from tidegate.link.fleet import pair
from tidegate.link.memory import Faults, MemoryBroker


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    pair(tmp_path / "device", tmp_path / "gateway")
    return tmp_path


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


async def ask(ways: BothWays, body: bytes) -> list[bytes]:
    return [payload async for payload in ways.device.request(body, deadline_s=30)]


def test_the_broker_is_used_while_it_is_there(fleet: Path) -> None:
    async def main() -> None:
        async with both_ways(fleet) as ways:
            assert await ask(ways, b"one") == whole(b"one")
            assert ways.paths.path == "memory"
            assert not ways.side.hub.handles

    run(main)


def test_a_broker_that_was_never_there_is_not_missed(fleet: Path) -> None:
    async def main() -> None:
        async with both_ways(fleet) as ways:
            ways.broker.stop()
            assert await ask(ways, b"one") == whole(b"one")
            assert ways.paths.path == "http"
            assert len(ways.side.hub.handles) == 1

    run(main)


def test_an_answer_goes_on_over_http_when_the_broker_dies_and_back_when_it_returns(
    fleet: Path,
) -> None:
    runs = 0

    async def slow(request: InboundRequest) -> AsyncIterator[bytes]:
        nonlocal runs
        runs += 1
        for number in range(200):
            yield b"%d" % number
            await asyncio.sleep(0.01)

    async def main() -> None:
        async with both_ways(fleet, slow) as ways:
            seen: list[bytes] = []
            async for payload in ways.device.request(b"question", deadline_s=30):
                seen.append(payload)
                if len(seen) == 20:
                    ways.broker.stop()
                if len(seen) == 60:
                    assert ways.paths.path == "http"
                    ways.broker.start()
            assert seen == [b"%d" % number for number in range(200)]
            assert ways.paths.path == "memory"
            assert runs == 1, "the handler ran once"
            await until(lambda: not ways.side.hub.handles, "the stream is closed")

    run(main)


@pytest.mark.parametrize(
    ("seed", "faults"), [(1, None), (2, Faults(drop=0.05, duplicate=0.05, reorder=0.05))]
)
def test_every_answer_comes_once_while_both_paths_come_and_go(
    fleet: Path, seed: int, faults: Faults | None
) -> None:
    rng = Random(seed)
    bodies = [b"request %d" % number for number in range(24)]

    async def disturb(ways: BothWays) -> None:
        while True:
            await asyncio.sleep(rng.uniform(0.05, 0.5))
            match rng.choice(("stop", "start", "cut")):
                case "stop":
                    ways.broker.stop()
                case "start":
                    ways.broker.start()
                case "cut":
                    ways.side.hub.end(ways.side.hub.handles, "replaced")

    async def main() -> None:
        timing = replace(QUICK, patience_s=0.1, steady_s=0.1, linger_s=0.05)
        async with both_ways(fleet, timing=timing, faults=faults) as ways:
            disturbing = asyncio.create_task(disturb(ways))
            answers = []
            for start in range(0, len(bodies), 6):
                some = (ask(ways, body) for body in bodies[start : start + 6])
                answers += await asyncio.gather(*some)
            disturbing.cancel()
            await asyncio.wait([disturbing])
            assert answers == [whole(body) for body in bodies]
            assert ways.paths.changes > 0
            assert ways.gateway.counters.completed == len(bodies), "each ran once"

    run(main)


def test_a_device_whose_gateway_is_not_on_the_broker_reaches_it_over_http(fleet: Path) -> None:
    """The device's own connection to the broker stands: silence is what tells."""

    async def main() -> None:
        timing = replace(QUICK, fresh_s=1.0)
        async with both_ways(fleet, timing=timing, device_broker=MemoryBroker()) as ways:
            assert await ask(ways, b"one") == whole(b"one")
            assert ways.paths.path == "http"

    run(main)
