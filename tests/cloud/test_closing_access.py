"""A service that ends while the machine that counts its limits says nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import pytest
from keyedapp import keyed

from tidegate.cloud import access
from tidegate.cloud.charges import Charge, MemoryLedger, Used


async def _silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes a connection and never says a word."""
    try:
        await asyncio.Event().wait()
    finally:
        writer.close()


def test_closing_waits_for_a_silent_redis_once_and_not_for_each_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("redis")
    from tidegate.cloud.redis_ledger import RedisLedger

    charge = Charge(meter="m", kind="count", unit="tokens", most=100, amount=10, lasts_s=60)

    tenths = [0]
    """Of a second, as this loop came to see them: none pass while the machine is held up."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.1)
            tenths[0] += 1

    async def main() -> int:
        server = await asyncio.start_server(_silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        ledger = RedisLedger(f"redis://127.0.0.1:{port}/0", close_s=0.2)
        for number in range(20):
            ledger.settle("key", f"claim-{number}", (charge,), Used(requests=1, tokens=1))
        ticking = asyncio.create_task(tick())
        await ledger.close()
        ticking.cancel()
        server.close()
        return tenths[0]

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(main()) < 40  # one command alone may take 5 s
    assert "20 calls could not be settled" in caplog.text


class HangingLedger(MemoryLedger):
    """Never lets go."""

    async def close(self) -> None:
        await asyncio.Event().wait()


def test_usage_is_written_before_the_ledger_is_waited_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with keyed(tmp_path) as world:
            kept, whole = world.access, world.access.ledger
            _, key = world.add()
            assert (await world.chat(key, max_tokens=3)).status_code == 200
            assert kept.usage.waiting == 1
            kept.ledger = HangingLedger(clock=time.monotonic)
            closing = asyncio.create_task(kept.close())
            async with asyncio.timeout(10):
                while kept.usage.waiting:
                    await asyncio.sleep(0.01)
            assert not closing.done()
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)
            kept.ledger = whole
            assert len([*kept.usage.rows(0, 1e12)]) == 1

    asyncio.run(main())


def test_closing_gives_up_on_what_is_never_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "CLOSE_S", 0.05)

    async def main() -> None:
        ended = asyncio.Event()

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async with asyncio.timeout(10), keyed(tmp_path) as world:
            world.access.later(hang())
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await ended.wait()

    asyncio.run(main())
