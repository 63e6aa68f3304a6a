"""Parts of a service that start together and end in order."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx
import pytest
from toyengine import PAGED, ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor

from tidegate.api.engine_backend import EngineBackend
from tidegate.api.http import create_app
from tidegate.api.lifecycle import (
    STUCK_STATUS,
    Part,
    exit_when_stuck,
    kept_alive,
    run_service,
    stop_on_signals,
)
from tidegate.api.server import BoundServer
from tidegate.engine.engine import Engine
from tidegate.engine.settings import EngineSettings
from tidegate.errors import UnavailableError

CHAT = "/v1/chat/completions"


def chat(**fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, **fields}


@dataclass(kw_only=True)
class Service:
    """A service of an engine, its HTTP surface and one more part, and what happened to that."""

    settle: Part | None = None
    drain_s: float = 5.0
    part_fails: bool = False
    behaviour: Behaviour = field(default_factory=lambda: Behaviour(step_s=0.01))
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    told: list[str] = field(default_factory=list)
    engine: Engine | None = None
    """Once it runs."""

    async def answering(self) -> None:
        """Wait until a request runs."""
        while self.engine is None or self.engine.snapshot().running == 0:
            await asyncio.sleep(0.005)

    async def run(self, test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        """Run the service while `test` does; returns when both have ended."""
        executor = ToyExecutor(PAGED, behaviour=self.behaviour)
        engine = self.engine = toy_engine(executor, eos=False)
        app = create_app(EngineBackend(engine, route="edge", created_s=0))
        server = BoundServer(app, "127.0.0.1", 0, drain_s=self.drain_s)
        service = run_service(
            engine=engine,
            server=server,
            stop=self.stop,
            parts=[self._part],
            settle=self.settle,
            drain_s=self.drain_s,
        )
        async with asyncio.timeout(90), httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            serving = asyncio.create_task(service)
            try:
                await test(http)
            finally:
                self.stop.set()
                await serving
        assert engine.snapshot().kv_usage == 0

    async def _part(self) -> None:
        self.told.append("part began")
        if self.part_fails:
            raise UnavailableError("the part is gone")
        try:
            await asyncio.Event().wait()
        finally:
            self.told.append("part ended")


def test_stopping_refuses_the_new_and_ends_what_runs() -> None:
    async def test(http: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(http.post(CHAT, json=chat(max_tokens=40)))
        await service.answering()
        assert (await http.get("/ready")).status_code == 200
        service.stop.set()
        while (await http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.005)
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/health")).status_code == 200
        late = await http.post(CHAT, json=chat())
        assert late.status_code == 503
        assert late.headers["Retry-After"]
        gate.set()
        answer = (await asking).json()
        assert answer["usage"]["completion_tokens"] == 40

    gate = threading.Event()
    service = Service(behaviour=Behaviour(gate=gate), drain_s=60)
    asyncio.run(service.run(test))
    assert service.told == ["part began", "part ended"]


def test_an_answer_longer_than_the_drain_is_cut_and_told_to_be_tried_again() -> None:
    async def test(http: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(http.post(CHAT, json=chat(max_tokens=100)))
        await service.answering()
        service.stop.set()
        answer = await asking
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "unavailable"

    service = Service(drain_s=0.3, behaviour=Behaviour(step_s=0.05))
    asyncio.run(service.run(test))


def test_a_part_that_fails_ends_the_service() -> None:
    async def test(_: httpx.AsyncClient) -> None:
        await asyncio.sleep(0.1)

    with pytest.RaisesGroup(pytest.RaisesExc(UnavailableError, match="the part is gone")):
        asyncio.run(Service(part_fails=True).run(test))


def test_parts_run_on_until_their_answers_have_left() -> None:
    async def settle() -> None:
        assert service.told == ["part began"]
        await asyncio.sleep(0.1)
        service.told.append("settled")

    async def test(_: httpx.AsyncClient) -> None:
        await asyncio.sleep(0.05)

    service = Service(settle=settle)
    asyncio.run(service.run(test))
    assert service.told == ["part began", "settled", "part ended"]


def test_a_part_that_never_settles_is_given_up_when_the_drain_ends() -> None:
    async def settle() -> None:
        await asyncio.Event().wait()

    async def test(_: httpx.AsyncClient) -> None:
        await asyncio.sleep(0.05)

    # `run` gives up on a service that has not ended in a minute and a half.
    asyncio.run(Service(settle=settle, drain_s=0.3).run(test))


# Signals itself, which must not meet the signals of a process that runs tests beside others.
@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda one: one.name)
def test_the_first_signal_stops_and_a_second_one_would_kill(number: signal.Signals) -> None:
    usual = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}

    async def run() -> None:
        stop = asyncio.Event()
        stop_on_signals(stop)
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.wait(), 5)
        left = signal.getsignal(number)
        assert left in (signal.SIG_DFL, signal.default_int_handler)

    try:
        asyncio.run(run())
    finally:
        for one, handler in usual.items():
            signal.signal(one, handler)


def test_a_part_that_is_kept_alive_begins_again_after_every_failure() -> None:
    async def run() -> None:
        async with asyncio.timeout(5):
            await kept_alive("part", part, first_wait_s=0.001)()

    async def part() -> None:
        runs.append(None)
        if len(runs) < 5:
            raise RuntimeError("confidential")

    runs: list[None] = []
    asyncio.run(run())
    assert len(runs) == 5


def test_what_a_failing_part_says_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def part() -> None:
        if not caplog.records:
            raise RuntimeError("confidential")

    asyncio.run(asyncio.wait_for(kept_alive("the link", part, first_wait_s=0.001)(), 5))
    assert "the link failed with RuntimeError" in caplog.text
    assert "confidential" not in caplog.text


def test_a_part_that_is_kept_alive_still_ends_by_cancellation() -> None:
    async def part() -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        task = asyncio.create_task(kept_alive("part", part)())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_step_that_never_returns_ends_the_process_when_asked_to() -> None:
    gate = threading.Event()
    executor = ToyExecutor(PAGED, behaviour=Behaviour(gate=gate))
    engine = toy_engine(executor, settings=EngineSettings(stall_after_s=0.1))
    left: list[int] = []

    async def test() -> None:
        async with serving(engine):
            watch = asyncio.create_task(exit_when_stuck(engine, every_s=0.05, leave=left.append))
            await asyncio.sleep(0.3)
            assert left == [], "idle is not stuck"
            answer = engine.submit(ask("a", (1, 2, 3)))
            async with asyncio.timeout(10):
                await watch
            assert left == [STUCK_STATUS]
            assert not engine.snapshot().healthy
            gate.set()
            await collect(answer)
            assert engine.snapshot().healthy

    asyncio.run(test())
