"""The gateway's handler on a real engine: the same bytes at every run, errors as the last event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from linkrequests import body, events, inbound, payloads
from toyengine import PAGED, SHAPES, serving
from toyexecutor import Behaviour, ToyExecutor
from toytext import toy_text

from tidegate.api.backend import Routed
from tidegate.api.engine_backend import EngineBackend
from tidegate.api.metrics import Metrics
from tidegate.api.wire import read_event
from tidegate.cloud.handler import LinkHandler, read_call
from tidegate.engine.engine import Engine
from tidegate.engine.events import Failed, Finished, TextDelta
from tidegate.engine.executor import PagedGeometry, SlotGeometry
from tidegate.engine.settings import EngineSettings
from tidegate.errors import RequestError


def test_the_link_asks_once_for_each_of_several_answers() -> None:
    with pytest.raises(RequestError, match=r"^n: 2: must be 1 over the link"):
        read_call(json.dumps(body(n=2)).encode())


Test = Callable[[LinkHandler, Engine], Awaitable[None]]


def with_handler(
    test: Test,
    *,
    geometry: PagedGeometry | SlotGeometry = PAGED,
    behaviour: Behaviour | None = None,
    metrics: Metrics | None = None,
    most_waiting: int = 64,
) -> None:
    async def run() -> None:
        executor = ToyExecutor(geometry, behaviour=behaviour, step_rows=4)
        settings = EngineSettings(most_waiting=most_waiting)
        engine = Engine(executor, toy_text(eos=False), model_id="toy", settings=settings)
        backend = EngineBackend(engine, route="cloud", created_s=0)
        async with serving(engine):
            await test(LinkHandler(backend, metrics or Metrics()), engine)

    asyncio.run(run())


def without_clock(found: list[bytes]) -> list[bytes]:
    """All but the end, whose times are a clock's; its usage is compared apart."""
    return found[:-1]


@pytest.mark.parametrize("geometry", SHAPES, ids=["paged", "slots"])
@pytest.mark.parametrize(
    ("temperature", "seed"),
    [(0, None), (1, 5), (1, None)],
    ids=["greedy", "seeded", "unseeded"],
)
def test_every_run_of_a_request_yields_the_same_bytes(
    geometry: PagedGeometry | SlotGeometry, temperature: float, seed: int | None
) -> None:
    async def test(handler: LinkHandler, _: Engine) -> None:
        request = inbound(body(temperature=temperature, seed=seed))
        first = await payloads(handler, request)
        # Again with the prefix cached, then beside others that make the batch another one.
        again = await payloads(handler, request)
        beside, *_others = await asyncio.gather(
            payloads(handler, request),
            *(payloads(handler, inbound(body(f"other {n}"), n)) for n in range(2, 7)),
        )
        assert without_clock(first) == without_clock(again) == without_clock(beside)
        assert len(first) > 10
        ends = [read_event(found[-1]) for found in (first, again, beside)]
        assert all(isinstance(end, Finished) and end.reason == "length" for end in ends)

    with_handler(test, geometry=geometry)


def test_text_that_waits_for_its_reader_is_not_joined() -> None:
    async def test(handler: LinkHandler, engine: Engine) -> None:
        prompt = await payloads(handler, inbound(body(temperature=0)))
        async with aclosing(handler(inbound(body(temperature=0)))) as answer:  # type: ignore[type-var]
            found = [await anext(answer)]
            async with asyncio.timeout(10):
                while engine.snapshot().finished == 1:
                    await asyncio.sleep(0.005)
            found += [payload async for payload in answer]
        assert without_clock(found) == without_clock(prompt)

    with_handler(test)


def test_two_unseeded_requests_are_not_the_same_draw() -> None:
    async def test(handler: LinkHandler, _: Engine) -> None:
        one, two = [
            await payloads(handler, inbound(body(temperature=1), number)) for number in (1, 2)
        ]
        assert one[1:-1] != two[1:-1]

    with_handler(test)


def test_the_answer_is_routed_text_and_an_end() -> None:
    async def test(handler: LinkHandler, _: Engine) -> None:
        routed, *texts, end = events(await payloads(handler, inbound(body(temperature=0))))
        assert isinstance(routed, Routed)
        assert (routed.route, routed.model) == ("cloud", "toy")
        assert all(isinstance(event, TextDelta) for event in texts)
        assert isinstance(end, Finished)
        assert end.usage.completion_tokens == 24
        completion = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}
        end = events(await payloads(handler, inbound(completion)))[-1]
        assert isinstance(end, Finished)
        assert end.usage.prompt_tokens == 3

    with_handler(test)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "body"),
        (b"\xff", "body"),
        (b"[]", "body"),
        (b'{"messages": []}', "messages"),
        (b'{"prompt": ""}', "prompt"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 9}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "a"}], "model": "other"}', "model"),
        (json.dumps(body("0123456789" * 20)).encode(), "messages"),
        (json.dumps({"prompt": [299_999]}).encode(), "prompt"),
    ],
)
def test_a_wrong_body_is_one_failed_event_that_names_the_field(content: bytes, named: str) -> None:
    async def test(handler: LinkHandler, engine: Engine) -> None:
        (only,) = events(await payloads(handler, inbound(content)))
        assert isinstance(only, Failed)
        assert (only.code, only.retryable) == ("invalid_request", False)
        assert only.message.startswith(named)
        assert engine.snapshot().running == 0
        assert len(events(await payloads(handler, inbound(body(), 2)))) > 2

    with_handler(test)


def test_a_full_engine_is_a_retryable_failed_event() -> None:
    async def test(handler: LinkHandler, engine: Engine) -> None:
        running = [payloads(handler, inbound(body(f"n {n}"), n)) for n in range(12)]
        found = [events(one)[-1] for one in await asyncio.gather(*running)]
        refused = [end for end in found if isinstance(end, Failed)]
        assert refused
        assert {(end.code, end.retryable) for end in refused} == {("over_capacity", True)}
        assert any(isinstance(end, Finished) for end in found)

    with_handler(test, behaviour=Behaviour(step_s=0.01), most_waiting=2)


def test_a_failed_step_is_a_failed_event_after_the_text() -> None:
    async def test(handler: LinkHandler, _: Engine) -> None:
        found: list[Any] = []
        async for payload in handler(inbound(body(temperature=0))):
            found.append(read_event(payload))
            if len(found) == 5:
                behaviour.fails = lambda step: True
        assert isinstance(found[-1], Failed)
        assert found[-1].code == "execution_failed"
        assert len(found) > 5

    behaviour = Behaviour(step_s=0.01)
    with_handler(test, behaviour=behaviour)


def test_closing_the_answer_frees_the_engine_and_settles() -> None:
    async def test(handler: LinkHandler, engine: Engine) -> None:
        await asyncio.wait_for(handler.settled(), 1)
        async with aclosing(handler(inbound(body()))) as answer:  # type: ignore[type-var]
            await anext(answer)
            assert engine.snapshot().running + engine.snapshot().waiting == 1
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(handler.settled(), 0.05)
        await asyncio.wait_for(handler.settled(), 5)
        async with asyncio.timeout(5):
            while engine.snapshot().running:
                await asyncio.sleep(0.005)

    with_handler(test, behaviour=Behaviour(step_s=0.02))


def test_a_service_that_stops_leaves_what_it_cannot_finish_open() -> None:
    async def test(handler: LinkHandler, engine: Engine) -> None:
        await engine.drain(1)
        answer = handler(inbound(body()))
        asking = asyncio.ensure_future(anext(answer))
        done, _rest = await asyncio.wait([asking], timeout=0.1)
        # A failure would be final for the device; the gateway's next start runs it.
        assert not done
        await asyncio.wait_for(handler.settled(), 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    with_handler(test)


def test_the_link_counts_in_the_same_metrics_as_http() -> None:
    async def test(handler: LinkHandler, _: Engine) -> None:
        running = [payloads(handler, inbound(body(f"n {n}"), n)) for n in range(12)]
        ends = [read_event(found[-1]) for found in await asyncio.gather(*running)]
        refused.append(sum(isinstance(end, Failed) for end in ends))

    metrics, refused = Metrics(), list[int]()
    with_handler(test, metrics=metrics, behaviour=Behaviour(step_s=0.01), most_waiting=2)
    shown = metrics.render().decode()
    assert 0 < refused[0] < 12
    assert f'{{code="over_capacity"}} {refused[0]}.0' in shown
    assert (
        f'tidegate_generation_tokens_total{{model_name="toy"}} {24 * (12 - refused[0])}.0' in shown
    )


def test_a_body_is_a_chat_when_it_has_messages() -> None:
    assert read_call(json.dumps(body()).encode()).kind == "chat"
    assert read_call(b'{"prompt": "a"}').kind == "completion"
    with pytest.raises(RequestError, match="body"):
        read_call(b"tide")
