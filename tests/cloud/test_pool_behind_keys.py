"""Keys before a pool of models: who is refused loads nothing, and one call holds one version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from keyedapp import CHAT, HELLO, keyed_access
from toypool import ToyModels, started, toy_pool

from tidegate.api.http import create_app
from tidegate.api.schema import read_chat
from tidegate.api.settings import HttpSettings
from tidegate.cloud.access import AccessControl
from tidegate.cloud.charges import Charge, Denied, MemoryLedger, Taken
from tidegate.cloud.cloud_backend import CloudBackend, after_waiting
from tidegate.cloud.key_rules import KeyRules, Quota, Rate

ONE_MODEL_MIB = 10


@dataclass(kw_only=True)
class World:
    """A pool with room for one of two models, of which `one` is in memory; and a client."""

    access: AccessControl
    backend: CloudBackend
    maker: ToyModels
    client: httpx.AsyncClient = field(repr=False)

    async def ask(self, rules: KeyRules, model: str, **body: Any) -> httpx.Response:
        """With a new key of these rules."""
        name = f"team-{len(self.access.keys.keys())}"
        _, key = self.access.keys.add(name, rules, now_s=self.access.clock())
        return await self.ask_with(key, model, **body)

    async def ask_with(self, key: str, model: str, **body: Any) -> httpx.Response:
        heads = {"Authorization": f"Bearer {key}"}
        body = {**HELLO, "model": model, "max_tokens": 2, **body}
        return await self.client.post(CHAT, json=body, headers=heads)


@asynccontextmanager
async def world(folder: Path, **maker: Any) -> AsyncIterator[World]:
    access, models = keyed_access(folder), ToyModels(**maker)
    pool = toy_pool(("one", "two"), models, models_mib=ONE_MODEL_MIB)
    async with asyncio.timeout(30), started(pool) as backend:
        transport = httpx.ASGITransport(
            create_app(backend, settings=HttpSettings(admission=access))
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            yield World(access=access, backend=backend, maker=models, client=client)
    await access.close()


def run(folder: Path, test: Callable[[World], Awaitable[None]], **maker: Any) -> None:
    async def main() -> None:
        async with world(folder, **maker) as found:
            await test(found)

    asyncio.run(main())


LIMITS: dict[str, dict[str, Any]] = {
    "a quota of requests": {"quotas": (Quota(unit="requests", period="day", amount=1),)},
    "a quota of tokens": {"quotas": (Quota(unit="tokens", period="month", amount=90),)},
    "a bucket": {"rates": (Rate(unit="tokens", amount=90, window_s=3600),)},
    "a fixed window": {
        "rates": (Rate(unit="requests", amount=1, window_s=3600, strategy="fixed"),)
    },
    "a window that slides over requests": {
        "rates": (Rate(unit="requests", amount=1, window_s=3600, strategy="sliding"),)
    },
    "a window that slides over tokens": {
        "rates": (Rate(unit="tokens", amount=90, window_s=3600, strategy="sliding"),)
    },
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_key_that_is_over_its_limit_loads_no_model(tmp_path: Path, limit: str) -> None:
    pytest.importorskip("limits", reason="the library of windows is not installed")

    async def test(world: World) -> None:
        now_s = world.access.clock()
        _, key = world.access.keys.add("spent", KeyRules(**LIMITS[limit]), now_s=now_s)
        # Of 90 tokens: a prompt of about 20 and an answer of 48. What is left is too little.
        answered = await world.ask_with(key, "one", max_tokens=48, ignore_eos=True)
        assert answered.status_code == 200
        refused = await world.ask_with(key, "two", max_tokens=60)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert world.maker.loads == ["one"]
        assert world.backend.pool.entries["two"].used == 0
        assert world.maker.closed == []
        other = await world.ask(KeyRules(), "two")
        assert other.status_code == 200
        assert world.maker.loads == ["one", "two"]

    run(tmp_path, test)


def test_a_call_that_is_larger_than_its_keys_limit_loads_no_model(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        rules = KeyRules(quotas=(Quota(unit="tokens", period="day", amount=40),))
        refused = await world.ask(rules, "two", max_tokens=40)
        assert refused.status_code == 413
        assert "41 tokens: must be at most 40" in refused.json()["error"]["message"]
        assert world.maker.loads == ["one"]

    run(tmp_path, test)


class SlowLedger(MemoryLedger):
    """Grants after a gate was opened."""

    asked = 0

    def __init__(self, gate: asyncio.Event) -> None:
        super().__init__(clock=lambda: 0.0)
        self.gate = gate

    async def take(self, key: str, claim: str, charges: Sequence[Charge]) -> Taken | Denied:
        self.asked += 1
        await self.gate.wait()
        return await super().take(key, claim, charges)


RATED = KeyRules(rates=(Rate(unit="tokens", amount=1000, window_s=60),))


def test_a_model_stays_while_its_call_is_admitted_though_another_wants_the_room(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        ledger = world.access.ledger = SlowLedger(asyncio.Event())
        first = asyncio.create_task(world.ask(RATED, "two"))
        while not ledger.asked:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(world.ask(KeyRules(), "one"))
        while not world.backend.pool.entries["one"].waiting:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        ledger.gate.set()
        assert (await first).status_code == (await second).status_code == 200
        assert world.maker.loads == ["one", "two", "one"], "each once for each call"

    run(tmp_path, test)


def test_a_client_that_leaves_while_its_call_is_admitted_gets_all_of_it_back(
    tmp_path: Path,
) -> None:
    async def test(world: World) -> None:
        ledger = world.access.ledger = SlowLedger(asyncio.Event())
        now_s = world.access.clock()
        record, key = world.access.keys.add("leaves", RATED, now_s=now_s)
        leaves = asyncio.create_task(world.ask_with(key, "one"))
        while not ledger.asked:
            await asyncio.sleep(0.001)
        leaves.cancel()
        await asyncio.sleep(0.01)
        assert not leaves.done(), "what was begun is ended"
        ledger.gate.set()
        await asyncio.gather(leaves, return_exceptions=True)
        answered = await world.ask_with(key, "one")
        assert answered.status_code == 200
        assert ledger._claims == {}
        entry = world.backend.pool.entries["one"]
        assert entry.current is not None
        assert entry.current.leases == 0
        world.access.usage.flush()
        rows = list(world.access.usage.rows(0, 1e12))
        assert [row.key_id for row in rows] == [record.id], "of the second call only"

    run(tmp_path, test)


@pytest.mark.parametrize(("waited_s", "left_ms"), [(0.0, 1000), (0.4, 600), (3.0, 1)])
def test_what_waiting_for_a_model_took_comes_off_the_calls_deadline(
    waited_s: float, left_ms: int
) -> None:
    call = read_chat({**HELLO, "tidegate": {"deadline_ms": 1000}})
    assert after_waiting(call, waited_s).options.deadline_ms == left_ms
    assert after_waiting(read_chat(HELLO), waited_s) == read_chat(HELLO)
