"""Both ends on two paths at once: a request survives every change from one to the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import pytest
from linkhttp import BothWays, both_ways, until, whole

from tidegate.link.effects import InboundRequest
from tidegate.link.fleet import pair


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
