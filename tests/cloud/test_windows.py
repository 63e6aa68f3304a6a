"""Fixed and sliding windows: what the library's strategies let pass, and what is given back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from keyedapp import Clock, keyed
from redisserver import redis_server

from tidegate.cloud.key_rules import Rate
from tidegate.errors import UnavailableError

if TYPE_CHECKING:
    from tidegate.cloud.windows import Windows

TOKENS = Rate(unit="tokens", amount=100, window_s=60, strategy="fixed")
SLIDING = Rate(unit="requests", amount=20, window_s=1, strategy="sliding")
NOON_S = 1_700_000_040.0  # a minute begins


def run(test: Callable[[Windows, Clock], Awaitable[None]], url: str | None = None) -> None:
    pytest.importorskip("limits", reason="the library of windows is not installed")
    from tidegate.cloud.windows import Windows

    async def main() -> None:
        clock = Clock(NOON_S)
        windows = Windows(url, clock=clock)
        await test(windows, clock)
        await windows.close()

    asyncio.run(main())


async def a_refused_amount_leaves_room(windows: Windows, clock: Clock) -> None:
    assert (await windows.take("key", TOKENS, 60)).granted
    looked = await windows.peek("key", TOKENS, 41)
    assert (looked.granted, looked.left) == (False, 40)
    assert (await windows.peek("key", TOKENS, 40)).granted
    for _ in range(5):
        refused = await windows.take("key", TOKENS, 50)
        assert (refused.granted, refused.left) == (False, 40)
    assert (await windows.take("key", TOKENS, 40)).granted
    clock.now_s += 59
    late = await windows.take("key", TOKENS, 1)
    assert (late.granted, late.reset_s) == (False, 1)
    assert not (await windows.peek("key", TOKENS, 1)).granted
    clock.now_s += 1
    assert (await windows.peek("key", TOKENS, 100)).granted
    assert (await windows.take("key", TOKENS, 100)).granted


async def a_late_return_goes_to_its_own_window(windows: Windows, clock: Clock) -> None:
    old = await windows.take("late", TOKENS, 100)
    await windows.give_back("late", TOKENS, 30, old.number)
    assert (await windows.take("late", TOKENS, 30)).granted
    clock.now_s += 60
    await windows.give_back("late", TOKENS, 70, old.number)
    assert (await windows.take("late", TOKENS, 100)).left == 0
    assert not (await windows.take("late", TOKENS, 1)).granted


async def who_comes_late_meets_the_window_it_asked_for(windows: Windows, clock: Clock) -> None:
    rate = Rate(unit="tokens", amount=100, window_s=1, strategy="fixed")
    assert (await windows.take("held up", rate, 100)).granted
    await asyncio.sleep(1.3)  # by its own clock the service is still in that window
    assert not (await windows.take("held up", rate, 1)).granted
    clock.now_s += 1
    assert (await windows.take("held up", rate, 100)).granted


async def any_second_has_no_more_than_a_seconds_worth(windows: Windows, _: Clock) -> None:
    granted: list[float] = []
    async with asyncio.timeout(20):  # of which a machine that is free needs two
        while len(granted) < 3 * SLIDING.amount:
            await asyncio.sleep(0.005)
            before_s = time.time()
            await windows.peek("slide", SLIDING, 1)
            if (await windows.take("slide", SLIDING, 1)).granted:
                granted.append(before_s)
    full = await windows.peek("slide", SLIDING, 1)
    assert (full.granted, full.left) == (False, 0)
    assert 0 < full.reset_s <= SLIDING.window_s
    pairs = zip(granted, granted[SLIDING.amount :], strict=False)
    # The clock is read twice: here, and where the entry is kept, a little later.
    assert all(later - first > SLIDING.window_s - 0.05 for first, later in pairs)


CHECKS = (
    a_refused_amount_leaves_room,
    a_late_return_goes_to_its_own_window,
    who_comes_late_meets_the_window_it_asked_for,
    any_second_has_no_more_than_a_seconds_worth,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda one: one.__name__)
def test_in_memory(check: Callable[[Windows, Clock], Awaitable[None]]) -> None:
    run(check)


@pytest.mark.system
def test_on_redis_and_without_it(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        for check in CHECKS:
            run(check, server.url)

        async def refuses(windows: Windows, clock: Clock) -> None:
            await windows.take("gone", TOKENS, 1)
            server.stop()
            for rate in (TOKENS, SLIDING):
                with pytest.raises(UnavailableError, match="Redis") as told:
                    await windows.take("gone", rate, 1)
                assert str(server.port) not in str(told.value)

        run(refuses, server.url)


def test_a_call_refused_by_one_window_takes_nothing_from_the_other_limits(tmp_path: Path) -> None:
    pytest.importorskip("limits", reason="the library of windows is not installed")

    async def main() -> None:
        async with keyed(tmp_path, clock=Clock(NOON_S)) as world:
            once = Rate(unit="requests", amount=2, window_s=3600, strategy="sliding")
            _, key = world.add(rates=(once, TOKENS))
            for left in ("47", "41"):  # reserves 53 of what the calls before it left, uses 6
                answer = await world.chat(key, max_tokens=50)
                await asyncio.gather(*world.access._returns)
                assert answer.headers["x-ratelimit-remaining-tokens"] == left
            refused = await world.chat(key, max_tokens=50)
            await asyncio.gather(*world.access._returns)
            assert refused.status_code == 429
            assert "2 requests in 3600 s (sliding)" in refused.json()["error"]["message"]
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
            state = await world.access.windows.take(world.access.keys.keys()[0].id, TOKENS, 88)
            assert state.granted
            assert state.left == 0

    asyncio.run(main())
