"""Counts, buckets and claims: the memory against an obvious twin, and Redis against it too."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyedapp import Clock
from redisserver import RedisServer, redis_server

from tidegate.cloud.charges import Charge, Denied, Ledger, MemoryLedger, Taken, Used
from tidegate.errors import UnavailableError

CAPACITY, WINDOW_S = 100, 10
BUCKET = Charge(
    meter="tokens:bucket",
    kind="bucket",
    unit="tokens",
    most=CAPACITY,
    amount=0,
    rate_per_s=CAPACITY / WINDOW_S,
)


def bucket(amount: int) -> Charge:
    return Charge(
        meter=BUCKET.meter,
        kind="bucket",
        unit="tokens",
        most=CAPACITY,
        amount=amount,
        rate_per_s=BUCKET.rate_per_s,
    )


def count(amount: int, *, most: int = CAPACITY, meter: str = "tokens:2026-11-21") -> Charge:
    return Charge(
        meter=meter, kind="count", unit="tokens", most=most, amount=amount, lasts_s=1000.0
    )


@dataclass
class TwinBucket:
    """A bucket in exact arithmetic: nothing but its level, brought up to date before every look."""

    level: Fraction = Fraction(CAPACITY)
    at_s: Fraction = Fraction(0)
    held: dict[int, int] = field(default_factory=dict)

    def flow_to(self, now_s: Fraction) -> None:
        flowed = (now_s - self.at_s) * CAPACITY / WINDOW_S
        self.level, self.at_s = min(Fraction(CAPACITY), self.level + flowed), now_s

    def take(self, now_s: Fraction, claim: int, amount: int) -> bool:
        self.flow_to(now_s)
        if amount > self.level:
            return False
        self.level -= amount
        self.held[claim] = amount
        return True

    def settle(self, now_s: Fraction, claim: int, used: int) -> None:
        if claim in self.held:
            self.flow_to(now_s)
            back = self.held.pop(claim) - used
            self.level = min(Fraction(CAPACITY), self.level + back)


# Eighths of a second and ten tokens a second: every level is exact in a float, too.
EIGHTHS = st.integers(0, 40)
STEPS = st.lists(
    st.tuples(EIGHTHS, st.sampled_from(["take", "settle"]), st.integers(0, 5), st.integers(0, 110)),
    max_size=40,
)


async def follow(
    ledger: Ledger, clock: Clock, steps: Sequence[tuple[int, str, int, int]], key: str
) -> list[bool | None]:
    """What a ledger says to a history of a bucket; settles are waited for.

    A look beforehand says the same and takes nothing.
    """
    said: list[bool | None] = []
    claims: dict[int, tuple[str, int]] = {}
    for number, (eighths, act, slot, amount) in enumerate(steps):
        clock.now_s += eighths / 8
        if act == "take" and slot not in claims:
            looked = await ledger.peek(key, (bucket(amount),))
            taken = await ledger.take(key, f"{number}", (bucket(amount),))
            assert looked == (None if isinstance(taken, Taken) else taken)
            said.append(isinstance(taken, Taken))
            if isinstance(taken, Taken):
                claims[slot] = (f"{number}", amount)
        elif act == "settle" and slot in claims:
            claim, reserved = claims.pop(slot)
            used = Used(requests=1, tokens=min(amount, reserved))
            ledger.settle(key, claim, (bucket(reserved),), used)
            said.append(None)
            pending = getattr(ledger, "_settling", ())
            await asyncio.gather(*pending)
    return said


def expected(steps: Sequence[tuple[int, str, int, int]]) -> list[bool | None]:
    twin, now_s, said = TwinBucket(), Fraction(0), list[bool | None]()
    for eighths, act, slot, amount in steps:
        now_s += Fraction(eighths, 8)
        if act == "take" and slot not in twin.held:
            said.append(twin.take(now_s, slot, amount))
        elif act == "settle" and slot in twin.held:
            twin.settle(now_s, slot, min(amount, twin.held[slot]))
            said.append(None)
    return said


@given(STEPS)
def test_a_bucket_says_what_its_exact_twin_says(steps: list[tuple[int, str, int, int]]) -> None:
    clock = Clock(0.0)
    said = asyncio.run(follow(MemoryLedger(clock=clock), clock, steps, "key"))
    assert said == expected(steps)


@given(st.lists(st.tuples(EIGHTHS, st.integers(1, 60)), min_size=1, max_size=60))
def test_no_stretch_of_time_gets_more_than_a_full_bucket_and_what_flowed_in(
    asks: list[tuple[int, int]],
) -> None:
    async def main() -> list[tuple[float, int]]:
        clock = Clock(0.0)
        ledger, granted = MemoryLedger(clock=clock), list[tuple[float, int]]()
        for number, (eighths, amount) in enumerate(asks):
            clock.now_s += eighths / 8
            if isinstance(await ledger.take("key", f"{number}", (bucket(amount),)), Taken):
                granted.append((clock.now_s, amount))
        return granted

    granted = asyncio.run(main())
    for first, (from_s, _) in enumerate(granted):
        for last, (to_s, _) in enumerate(granted[first:], first):
            spent = sum(amount for _, amount in granted[first : last + 1])
            assert spent <= CAPACITY + (to_s - from_s) * CAPACITY / WINDOW_S


ACTS = st.lists(
    st.tuples(st.sampled_from(["take", "settle", "again"]), st.integers(0, 7), st.integers(0, 60)),
    max_size=40,
)


async def keeps_books(ledger: Ledger, key: str, acts: Sequence[tuple[str, int, int]]) -> None:
    """A count is what was used and what is still reserved, and never above its most."""
    spent, held, settled = 0, dict[int, int](), dict[int, int]()
    for act, slot, amount in acts:
        if act == "take" and slot not in held and slot not in settled:
            looked = await ledger.peek(key, (count(amount),))
            taken = await ledger.take(key, f"{slot}", (count(amount),))
            assert (looked is None) is isinstance(taken, Taken)
            fits = spent + sum(held.values()) + amount <= CAPACITY
            assert isinstance(taken, Taken) is fits
            if fits:
                held[slot] = amount
        elif act == "settle" and slot in held:
            used = min(amount, held[slot])
            ledger.settle(key, f"{slot}", (count(held[slot]),), Used(requests=1, tokens=used))
            settled[slot] = held.pop(slot)
            spent += used
        elif act == "again" and slot in settled:
            once_more = Used(requests=1, tokens=amount)
            ledger.settle(key, f"{slot}", (count(settled[slot]),), once_more)
        await asyncio.gather(*getattr(ledger, "_settling", ()))
        (left,) = _left(await ledger.take(key, "look", (count(0),)))
        assert left == CAPACITY - spent - sum(held.values())


def _left(taken: Taken | Denied) -> tuple[float, ...]:
    assert isinstance(taken, Taken)
    return taken.left


@given(ACTS)
def test_nothing_is_lost_and_nothing_is_spent_twice(acts: list[tuple[str, int, int]]) -> None:
    asyncio.run(keeps_books(MemoryLedger(clock=Clock()), "key", acts))


@pytest.mark.system
def test_nothing_is_lost_and_nothing_is_spent_twice_on_redis(server: RedisServer) -> None:
    from tidegate.cloud.redis_ledger import RedisLedger

    runs = 0

    @hypothesis.settings(max_examples=40, deadline=None)
    @given(ACTS)
    def check(acts: list[tuple[str, int, int]]) -> None:
        nonlocal runs
        runs += 1

        async def main() -> None:
            ledger = RedisLedger(server.url)
            await keeps_books(ledger, f"books-{runs}", acts)
            await ledger.close()

        asyncio.run(main())

    check()


def test_a_claim_takes_all_of_its_charges_or_none() -> None:
    async def main() -> None:
        ledger = MemoryLedger(clock=Clock())
        denied = await ledger.take("key", "a", (bucket(60), count(60, most=50)))
        assert denied == Denied(index=1, left=50)
        assert await ledger.take("key", "b", (bucket(100),)) == Taken(left=(0,))

    asyncio.run(main())


def test_a_claim_is_settled_once() -> None:
    async def main() -> None:
        ledger = MemoryLedger(clock=Clock())
        await ledger.take("key", "a", (count(80),))
        for _ in range(3):
            ledger.settle("key", "a", (count(80),), Used(requests=1, tokens=10))
        assert await ledger.take("key", "b", (count(80),)) == Taken(left=(10,))

    asyncio.run(main())


def test_keys_have_meters_of_their_own() -> None:
    async def main() -> None:
        ledger = MemoryLedger(clock=Clock())
        assert isinstance(await ledger.take("one", "a", (count(100),)), Taken)
        assert isinstance(await ledger.take("two", "b", (count(100),)), Taken)

    asyncio.run(main())


def test_memory_forgets_buckets_that_are_full_again_and_days_that_are_over() -> None:
    async def main() -> None:
        clock = Clock()
        ledger = MemoryLedger(clock=clock)
        for number in range(50):
            await ledger.take(f"key-{number}", "a", (bucket(50), count(1)))
        clock.now_s += 2000
        await ledger.take("other", "a", (bucket(1),))
        assert len(ledger._meters) == 1

    asyncio.run(main())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> object:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.mark.system
def test_redis_says_what_the_exact_twin_says(server: RedisServer) -> None:
    from tidegate.cloud.redis_ledger import RedisLedger

    runs = 0

    class Timed(RedisLedger):
        clock = Clock(0.0)

        async def _call(self, script: object, key: str, claim: str, *more: object) -> object:
            self.now_s = self.clock.now_s
            return await super()._call(script, key, claim, *more)

    @hypothesis.settings(max_examples=60, deadline=None)
    @given(STEPS)
    def check(steps: list[tuple[int, str, int, int]]) -> None:
        nonlocal runs
        runs += 1

        async def main() -> list[bool | None]:
            ledger = Timed(server.url, lease_s=1e6)
            ledger.clock = Clock(0.0)
            said = await follow(ledger, ledger.clock, steps, f"twin-{runs}")
            await ledger.close()
            return said

        assert asyncio.run(main()) == expected(steps)

    check()


@pytest.mark.system
def test_a_dead_replica_loses_its_claims_and_a_slow_one_still_pays(server: RedisServer) -> None:
    from tidegate.cloud.redis_ledger import RedisLedger

    async def main() -> None:
        dead = RedisLedger(server.url, lease_s=10, now_s=1000.0)
        live = RedisLedger(server.url, lease_s=10, now_s=1000.0)
        charges = (count(80), bucket(80))
        assert isinstance(await dead.take("lease", "a", charges), Taken)
        assert isinstance(await live.take("lease", "b", charges), Denied)
        assert await live.peek("lease", charges) == Denied(index=0, left=20)
        live.now_s = 1011.0  # the lease ran out, and the bucket is full again
        assert await live.peek("lease", charges) is None
        assert await live.take("lease", "c", charges) == Taken(left=(20, 20))
        # The one that was thought dead ends its call: what it used is owed, once.
        dead.now_s = 1011.0
        for _ in range(2):
            dead.settle("lease", "a", charges, Used(requests=1, tokens=15))
        await dead.close()
        live.settle("lease", "c", charges, Used(requests=1, tokens=0))
        await asyncio.gather(*live._settling)
        assert await live.take("lease", "d", (count(0), bucket(0))) == Taken(left=(85, 85))
        await live.close()

    asyncio.run(main())


@pytest.mark.system
def test_a_live_replica_renews_its_claims(server: RedisServer) -> None:
    from tidegate.cloud.redis_ledger import RedisLedger

    async def main() -> None:
        one = RedisLedger(server.url, lease_s=0.6)
        other = RedisLedger(server.url, lease_s=0.6)
        running = asyncio.create_task(one.run())
        await one.take("renewed", "a", (count(80),))
        await asyncio.sleep(1.5)
        assert isinstance(await other.take("renewed", "b", (count(80),)), Denied)
        running.cancel()
        await asyncio.sleep(0.8)
        assert isinstance(await other.take("renewed", "b", (count(80),)), Taken)
        await asyncio.gather(running, return_exceptions=True)
        await one.close()
        await other.close()

    asyncio.run(main())


@pytest.mark.system
def test_a_redis_that_is_gone_refuses_calls_and_is_paid_when_it_is_back(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        from tidegate.cloud.redis_ledger import RedisLedger

        async def main() -> None:
            ledger = RedisLedger(server.url, lease_s=0.6)
            running = asyncio.create_task(ledger.run())
            await ledger.take("gone", "a", (count(80),))
            server.stop()
            with pytest.raises(UnavailableError, match="Redis") as told:
                await ledger.take("gone", "b", (count(10),))
            assert str(server.port) not in str(told.value)
            ledger.settle("gone", "a", (count(80),), Used(requests=1, tokens=30))
            await asyncio.gather(*ledger._settling)
            server.start()
            await asyncio.sleep(1.0)
            # It survived the restart, and the correction came later.
            assert await ledger.take("gone", "c", (count(10),)) == Taken(left=(60,))
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await ledger.close()

        asyncio.run(main())
