"""Cloud answers whose caller is gone: who asks again gets them, and HTTP shows them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from linklab import FAST
from linkpair import HERE, ScriptedCloud, finished, said
from starlette.applications import Starlette

from tidegate.api.backend import AnswerEvent
from tidegate.api.schema import Call, read_chat
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.link_answers import answer_routes
from tidegate.engine.events import TextDelta
from tidegate.errors import CapacityError, RequestError
from tidegate.link.device import DeviceLink
from tidegate.link.envelope import new_request_id
from tidegate.link.fleet import pair
from tidegate.link.gateway import Gateway
from tidegate.link.memory import MemoryBroker, MemoryTransport
from tidegate.link.outbox import Outcome
from tidegate.link.prekeys import ModelOffer


class Home:
    """A gateway that stays, and a device whose process may go away in the middle of anything."""

    def __init__(self, folder: Path, cloud: ScriptedCloud) -> None:
        pair(folder / "device", folder / "gateway")
        self.folder, self.cloud, self.broker = folder, cloud, MemoryBroker()
        self.gateway = Gateway(
            folder / "gateway",
            MemoryTransport(self.broker),
            cloud,
            models=lambda: (ModelOffer(id="big", context_tokens=512),),
            timing=FAST,
        )

    @asynccontextmanager
    async def device(self) -> AsyncIterator[DeviceLink]:
        """One life of the device's daemon."""
        link = DeviceLink(self.folder / "device", MemoryTransport(self.broker), timing=FAST)
        running = asyncio.create_task(link.run())
        try:
            while not await link.gateways():
                await asyncio.sleep(0.005)
            yield link
        finally:
            await stop(running)
            await link.close()


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def play(
    folder: Path, cloud: ScriptedCloud, test: Callable[[Home], Coroutine[Any, Any, None]]
) -> None:
    async def run() -> None:
        home = Home(folder, cloud)
        running = asyncio.create_task(home.gateway.run())
        try:
            async with asyncio.timeout(20):
                await test(home)
        finally:
            await stop(running)
            await home.gateway.close()

    asyncio.run(run())


def call(words: str = "which tide?", *, key: str | None = "key-1", n: int = 1) -> Call:
    body = {"messages": [{"role": "user", "content": words}], "temperature": 0.7, "n": n}
    return replace(read_chat(body), retry_key=key)


def fresh_id() -> str:
    return new_request_id(time.time_ns() // 1_000_000).hex()


async def ask(leg: CloudLeg, asked: Call) -> list[AnswerEvent]:
    async with aclosing(leg.answer(asked, fresh_id(), "because")) as events:
        return [event async for event in events]


def text_of(events: list[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def whole(link: DeviceLink) -> None:
    """Wait until everything in the outbox is whole."""
    while not all(one.outcome is Outcome.DONE for one in await link.pending()):
        await asyncio.sleep(0.005)


async def dies_while_asking(home: Home, asked: Call) -> None:
    """The daemon goes away while the answer streams; what it had is in the outbox."""
    async with home.device() as link:
        events = CloudLeg(link).answer(asked, fresh_id(), "because")
        await anext(events)
        await anext(events)
    with suppress(Exception):
        await events.aclose()


SCRIPT = (HERE, said("high "), said("tide"), finished())


class Slow(ScriptedCloud):
    """Waits after every event, so that a device can die between two of them."""

    pause_s = 0.02

    async def __call__(self, request: Any) -> AsyncIterator[bytes]:
        async for payload in super().__call__(request):
            yield payload
            await asyncio.sleep(self.pause_s)


def test_a_call_that_is_repeated_with_its_key_gets_the_answer_that_nobody_read(
    tmp_path: Path,
) -> None:
    async def test(home: Home) -> None:
        await dies_while_asking(home, call())
        async with home.device() as link:
            leg = CloudLeg(link)
            assert await leg.holds(call())
            await whole(link)
            assert text_of(await ask(leg, call())) == "high tide"
            assert len(home.cloud.bodies) == 1, "it ran once"
            assert not await leg.holds(call()), "what was read is forgotten"
            assert await link.pending() == ()

    play(tmp_path, Slow(SCRIPT), test)


def test_a_repeated_call_may_join_an_answer_that_is_still_on_its_way(tmp_path: Path) -> None:
    async def test(home: Home) -> None:
        await dies_while_asking(home, call())
        async with home.device() as link:
            assert text_of(await ask(CloudLeg(link), call())) == "high tide"
        assert len(home.cloud.bodies) == 1

    play(tmp_path, Slow(SCRIPT), test)


def test_another_call_under_the_same_key_is_refused_by_name(tmp_path: Path) -> None:
    async def test(home: Home) -> None:
        await dies_while_asking(home, call())
        async with home.device() as link:
            with pytest.raises(RequestError, match="Idempotency-Key: was used") as refusal:
                await ask(CloudLeg(link), call("another tide?"))
            assert refusal.value.status == 422
            assert not await CloudLeg(link).holds(call(key="key-2"))
            assert not await CloudLeg(link).holds(call(key=None))

    play(tmp_path, Slow(SCRIPT), test)


def test_two_callers_with_one_key_at_once_are_one_and_a_conflict(tmp_path: Path) -> None:
    async def test(home: Home) -> None:
        async with home.device() as link:
            leg = CloudLeg(link)
            async with aclosing(leg.answer(call(), fresh_id(), "because")) as events:
                await anext(events)
                with pytest.raises(RequestError, match="being read already") as refusal:
                    await ask(leg, call())
                assert refusal.value.status == 409

    play(tmp_path, Slow(SCRIPT), test)


def test_of_callers_who_come_back_at_the_same_moment_one_gets_the_answer(tmp_path: Path) -> None:
    async def test(home: Home) -> None:
        await dies_while_asking(home, call())
        async with home.device() as link:
            leg = CloudLeg(link)
            results = await asyncio.gather(
                *(ask(leg, call()) for _ in range(3)), return_exceptions=True
            )
        refused = [one for one in results if isinstance(one, RequestError)]
        answered = [one for one in results if isinstance(one, list)]
        assert [one.status for one in refused] == [409, 409]
        assert [text_of(one) for one in answered] == ["high tide"]
        assert len(home.cloud.bodies) == 1

    play(tmp_path, Slow(SCRIPT), test)


def test_after_a_failure_the_same_key_asks_anew(tmp_path: Path) -> None:
    async def test(home: Home) -> None:
        await dies_while_asking(home, call())
        async with home.device() as link:
            link._outbox._max_bytes = link._outbox._bytes
            while [one.code for one in await link.pending()] != ["outbox_full"]:
                await asyncio.sleep(0.005)
            link._outbox._max_bytes = 1_000_000
            assert not await CloudLeg(link).holds(call())
            assert text_of(await ask(CloudLeg(link), call())) == "high tide" * 50
        assert len(home.cloud.bodies) == 2

    play(tmp_path, Slow((HERE, *[said("high "), said("tide")] * 50, finished())), test)


def test_an_answer_without_room_is_an_error_that_says_so(tmp_path: Path) -> None:
    async def test(home: Home) -> None:
        async with home.device() as link:
            link._outbox._max_bytes = 2000
            with pytest.raises(CapacityError, match="outbox has no room for this answer"):
                await ask(CloudLeg(link), call())

    play(tmp_path, ScriptedCloud((HERE, said("high " * 1000), finished())), test)


def test_http_lists_shows_and_forgets_what_nobody_read(tmp_path: Path) -> None:
    async def test(home: Home) -> None:
        await dies_while_asking(home, call(key=None))
        async with home.device() as link:
            await whole(link)
            transport = httpx.ASGITransport(Starlette(routes=answer_routes(link)))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                (shown,) = (await client.get("/link/answers")).json()["answers"]
                assert shown["state"] == "whole"
                assert not shown["is_read"]
                assert shown["held_bytes"] > 0
                assert "tide" not in str(shown)
                path = f"/link/answers/{shown['id']}"
                one = (await client.get(path)).json()
                assert (one["text"], one["finish_reason"]) == ("high tide", "stop")
                assert (await client.get(path)).json()["text"] == "high tide", "reading keeps it"
                assert (await client.delete(path)).status_code == 204
                assert (await client.get("/link/answers")).json() == {"answers": []}
                for bad in (path, "/link/answers/zz", "/link/answers/00"):
                    assert (await client.get(bad)).status_code == 404
                    assert (await client.delete(bad)).status_code == 404

    play(tmp_path, Slow(SCRIPT), test)


def test_an_answer_that_is_being_read_cannot_be_forgotten_and_one_that_runs_can(
    tmp_path: Path,
) -> None:
    async def test(home: Home) -> None:
        async with home.device() as link:
            transport = httpx.ASGITransport(Starlette(routes=answer_routes(link)))
            async with (
                httpx.AsyncClient(transport=transport, base_url="http://test") as client,
                aclosing(CloudLeg(link).answer(call(), fresh_id(), "x")) as events,
            ):
                await anext(events)
                (shown,) = (await client.get("/link/answers")).json()["answers"]
                assert (shown["state"], shown["is_read"]) == ("running", True)
                path = f"/link/answers/{shown['id']}"
                assert (await client.delete(path)).status_code == 409
            while home.gateway.counters.cancelled < 1:
                await asyncio.sleep(0.005)
        await dies_while_asking(home, call("again?"))
        async with home.device() as link:
            transport = httpx.ASGITransport(Starlette(routes=answer_routes(link)))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                (shown,) = (await client.get("/link/answers")).json()["answers"]
                assert shown["state"] == "running"
                path = f"/link/answers/{shown['id']}"
                assert "text" not in (await client.get(path)).json()
                while home.gateway.counters.resends < 1 or link.counters.opened < 1:
                    await asyncio.sleep(0.005)
                assert (await client.delete(path)).status_code == 204
            while home.gateway.counters.cancelled < 2:
                await asyncio.sleep(0.005)

    play(tmp_path, Slow((HERE, said("high "), said("tide"), None)), test)
