"""Windows that slide over tokens: never too much, returns where they belong; memory and Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyedapp import Clock, keyed
from redisserver import redis_server

from tidegate.cloud.charges import Charge, Denied, MemoryLedger, Taken, Used
from tidegate.cloud.key_rules import Rate
from tidegate.cloud.sliding import SLOTS

if TYPE_CHECKING:
    from tidegate.cloud.redis_ledger import RedisLedger

MOST, WINDOW_S = 100, 16.0
SLOT_S = WINDOW_S / SLOTS  # an eighth: every time below is exact in a float
Step = tuple[int, str, int, int]
STEPS = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.sampled_from(["take", "settle"]),
        st.integers(0, 5),
        st.integers(0, 110),
    ),
    max_size=40,
)


def sliding(amount: int) -> Charge:
    return Charge(
        meter="tokens:sliding",
        kind="sliding",
        unit="tokens",
        most=MOST,
        amount=amount,
        window_s=WINDOW_S,
    )


@dataclass
class Twin:
    """Every call with its time, looked through at each question."""

    calls: dict[int, tuple[float, int]] = field(default_factory=dict)

    def counts(self, now_s: float) -> int:
        # A call counts until the whole slot it was taken in has left the window.
        return sum(
            amount
            for at_s, amount in self.calls.values()
            if now_s < (at_s // SLOT_S + 1) * SLOT_S + WINDOW_S
        )


async def follow(
    ledger: MemoryLedger | RedisLedger, clock: Clock, steps: Sequence[Step], key: str
) -> None:
    """Take and settle, and compare every answer with the twin's."""
    twin, held = Twin(), dict[int, tuple[int, int]]()
    for number, (eighths, act, place, amount) in enumerate(steps):
        clock.now_s += eighths / 8
        if not isinstance(ledger, MemoryLedger):  # Redis has a clock of its own
            ledger.now_s = clock.now_s
        if act == "take" and place not in held:
            taken = await ledger.take(key, f"{number}", (sliding(amount),))
            left = MOST - twin.counts(clock.now_s)
            if amount <= left:
                assert taken == Taken(left=(left - amount,))
                twin.calls[number] = (clock.now_s, amount)
                held[place] = (number, amount)
                continue
            assert isinstance(taken, Denied)
            assert taken.left == left
            assert taken.wait_s is not None
            if amount <= MOST:
                assert MOST - twin.counts(clock.now_s + taken.wait_s) >= amount
                before_s = clock.now_s + taken.wait_s - 0.01
                assert MOST - twin.counts(before_s) < amount, "and not a moment earlier"
        elif act == "settle" and place in held:
            claim, reserved = held.pop(place)
            used = min(amount, reserved)
            ledger.settle(key, f"{claim}", (sliding(reserved),), Used(requests=1, tokens=used))
            await asyncio.gather(*getattr(ledger, "_settling", ()))
            twin.calls[claim] = (twin.calls[claim][0], used)


@given(STEPS)
def test_a_window_says_what_a_log_of_all_calls_says(steps: list[Step]) -> None:
    clock = Clock(1000.0)
    asyncio.run(follow(MemoryLedger(clock=clock), clock, steps, "key"))


@pytest.mark.system
def test_on_redis_too(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        from tidegate.cloud.redis_ledger import RedisLedger

        runs = 0

        @hypothesis.settings(max_examples=60, deadline=None)
        @given(STEPS)
        def check(steps: list[Step]) -> None:
            nonlocal runs
            runs += 1

            async def main() -> None:
                ledger = RedisLedger(server.url, now_s=1000.0)
                await follow(ledger, Clock(1000.0), steps, f"slide-{runs}")
                await ledger.close()

            asyncio.run(main())

        check()


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), min_size=1, max_size=60))
def test_no_stretch_of_a_windows_length_gets_more_than_its_amount(
    asks: list[tuple[int, int]],
) -> None:
    async def main() -> list[tuple[float, int]]:
        clock = Clock(0.0)
        ledger, granted = MemoryLedger(clock=clock), list[tuple[float, int]]()
        for number, (hundredths, amount) in enumerate(asks):
            clock.now_s += hundredths / 100
            if isinstance(await ledger.take("key", f"{number}", (sliding(amount),)), Taken):
                granted.append((clock.now_s, amount))
        return granted

    granted = asyncio.run(main())
    for first_s, _ in granted:
        inside = [amount for at_s, amount in granted if first_s <= at_s < first_s + WINDOW_S]
        assert sum(inside) <= MOST


def test_many_calls_are_kept_in_few_numbers_and_forgotten_with_their_window() -> None:
    async def main() -> None:
        clock = Clock(0.0)
        ledger = MemoryLedger(clock=clock)
        for number in range(3000):
            clock.now_s += 0.01
            await ledger.take("key", f"{number}", (sliding(0),))
        (window,) = ledger._windows.values()
        assert len(window._amounts) <= SLOTS + 1
        clock.now_s += 100
        await ledger.take("other", "x", (sliding(1),))
        assert [key for key, _ in ledger._windows] == ["other"]

    asyncio.run(main())


@pytest.mark.system
def test_a_claim_whose_process_died_leaves_the_window_it_was_taken_in(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        from tidegate.cloud.redis_ledger import RedisLedger

        async def main() -> None:
            ledger = RedisLedger(server.url, lease_s=2.0, now_s=1000.0)
            assert await ledger.take("key", "dead", (sliding(80),)) == Taken(left=(20,))
            ledger.now_s = 1001.0
            assert isinstance(await ledger.take("key", "b", (sliding(30),)), Denied)
            ledger.now_s = 1003.0
            assert await ledger.take("key", "c", (sliding(30),)) == Taken(left=(70,))
            # It was alive after all: what it used is owed.
            ledger.settle("key", "dead", (sliding(80),), Used(requests=1, tokens=60))
            await asyncio.gather(*ledger._settling)
            assert await ledger.take("key", "d", (sliding(0),)) == Taken(left=(10,))
            await ledger.close()

        asyncio.run(main())


def test_tokens_that_a_call_did_not_use_return_to_its_window(tmp_path: Path) -> None:
    async def main() -> None:
        async with keyed(tmp_path) as world:
            rate = Rate(unit="tokens", amount=100, window_s=60, strategy="sliding")
            _, key = world.add(rates=(rate,))
            first = await world.chat(key, max_tokens=90)  # reserves 93, uses 6
            assert first.headers["x-ratelimit-remaining-tokens"] == "7"
            second = await world.chat(key, max_tokens=90)
            assert second.headers["x-ratelimit-remaining-tokens"] == "1"
            third = await world.chat(key, max_tokens=90)
            assert third.status_code == 429
            assert "100 tokens in 60 s (sliding)" in third.json()["error"]["message"]
            assert 55 <= int(third.headers["Retry-After"]) <= 61
            assert (await world.chat(key, max_tokens=80)).status_code == 200

    asyncio.run(main())
