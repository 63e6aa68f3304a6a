"""A front over real engines that die, drain, refuse and answer differently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
from toyengine import PAGED, toy_engine
from toyexecutor import Behaviour, ToyExecutor
from toytext import toy_text

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.schema import Call, read_chat
from tidegate.cloud.ray.backend import MOST_RUNS, LostReplicaError, RayBackend
from tidegate.cloud.ray.messages import Ask
from tidegate.cloud.ray.replay import DivergedError
from tidegate.cloud.ray.replica import Part, Replica
from tidegate.engine.events import Finished, TextDelta
from tidegate.errors import CapacityError, RequestError, UnavailableError


@dataclass(kw_only=True)
class Fleet:
    """Replicas in this process; `dies_after[n]` ends the n-th run after so many payloads."""

    replicas: list[Replica]
    dies_after: list[int] = field(default_factory=list)
    runs: int = 0
    asks: list[Ask] = field(default_factory=list)

    async def answer(self, ask: Ask) -> AsyncGenerator[Part, None]:
        run, self.runs = self.runs, self.runs + 1
        self.asks.append(ask)
        left = self.dies_after[run] if run < len(self.dies_after) else None
        async with aclosing(self.replicas[run % len(self.replicas)].answer(ask)) as parts:
            async for part in parts:
                if left is None or not isinstance(part, tuple):
                    yield part
                    continue
                for payload in part:
                    if left == 0:
                        raise LostReplicaError("killed")
                    left -= 1
                    yield (payload,)


def call(**fields: object) -> Call:
    said = [{"role": "user", "content": "hello"}]
    return read_chat({"messages": said, "max_tokens": 12, **fields})


OTHER = Behaviour(distorts=lambda step, logits: -logits)
"""Of a replica with another model."""
Test = Callable[[RayBackend, Fleet], Awaitable[None]]


def with_fleet(
    test: Test, *, replicas: int = 2, executors: list[ToyExecutor] | None = None
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(30):
            made = []
            for number in range(replicas):
                executor = executors[number] if executors else ToyExecutor(PAGED)
                replica = Replica(toy_engine(executor), executor)
                await replica.start()
                stack.push_async_callback(replica.close)
                made.append(replica)
            fleet = Fleet(replicas=made)
            facts = made[0].facts
            text = toy_text(context_tokens=facts.context_tokens)
            await test(RayBackend(fleet, text, facts, pause_s=0.0), fleet)

    asyncio.run(main())


async def answered(backend: RayBackend, asked: Call) -> list[AnswerEvent]:
    return [event async for event in backend.answer_as(asked, "0b" * 16)]


def text_of(events: list[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_an_answer_is_routed_then_text_then_its_end() -> None:
    async def test(backend: RayBackend, fleet: Fleet) -> None:
        first, *_, last = await answered(backend, call())
        assert isinstance(first, Routed)
        assert first.route == "cloud"
        assert isinstance(last, Finished)
        assert last.usage.completion_tokens == 12

    with_fleet(test)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("dies_after", [[0], [1], [5], [5, 3, 9]])
def test_nobody_notices_a_replica_that_dies(dies_after: list[int], temperature: float) -> None:
    async def test(backend: RayBackend, fleet: Fleet) -> None:
        whole = await answered(backend, call(temperature=temperature))
        fleet.runs, fleet.dies_after = 0, dies_after
        again = await answered(backend, call(temperature=temperature))
        assert again[:-1] == whole[:-1]
        assert isinstance(again[-1], Finished)
        assert backend.counters.rerun == len(dies_after)
        assert backend.counters.continued == sum(count > 1 for count in dies_after)

    with_fleet(test)


def test_a_call_that_kills_everyone_is_given_up_with_an_error_to_retry_on() -> None:
    async def test(backend: RayBackend, fleet: Fleet) -> None:
        fleet.dies_after = [0] * 10
        with pytest.raises(UnavailableError, match="were lost"):
            await answered(backend, call())
        assert fleet.runs == MOST_RUNS
        assert backend.counters.lost == 1
        assert UnavailableError.retryable

    with_fleet(test)


def test_a_replica_that_answers_differently_ends_the_answer_and_adds_nothing() -> None:
    async def test(backend: RayBackend, fleet: Fleet) -> None:
        whole = await answered(backend, call())
        fleet.runs, fleet.dies_after = 0, [6]
        got: list[AnswerEvent] = []

        async def read() -> None:
            async for event in backend.answer_as(call(), "0b" * 16):
                got.append(event)  # noqa: PERF401, what came before the error counts

        with pytest.raises(DivergedError):
            await read()
        assert got == whole[:6]

    with_fleet(test, executors=[ToyExecutor(PAGED), ToyExecutor(PAGED, behaviour=OTHER)])


def test_a_draining_replica_hands_its_calls_on() -> None:
    async def test(backend: RayBackend, fleet: Fleet) -> None:
        whole = await answered(backend, call())
        fleet.runs = 0
        await fleet.replicas[0]._engine.drain(1.0)
        assert (await answered(backend, call()))[:-1] == whole[:-1]
        assert fleet.runs == 2

    with_fleet(test)


def test_the_same_beginning_has_the_same_anchor() -> None:
    async def test(backend: RayBackend, fleet: Fleet) -> None:
        for last in ("one", "two"):
            turns = [{"role": "user", "content": "x" * 64}, {"role": "user", "content": last}]
            await answered(backend, call(messages=turns))
        await answered(backend, call())
        one, two, other = (ask.anchor for ask in fleet.asks)
        assert one == two
        assert one is not None
        assert one != other

    with_fleet(test)


def test_closing_an_answer_ends_it_in_the_engine() -> None:
    async def test(backend: RayBackend, fleet: Fleet) -> None:
        answer = backend.answer_as(call(max_tokens=60), "0b" * 16)
        async with aclosing(answer) as events:
            await anext(events)
            await anext(events)
        replica = fleet.replicas[0]
        async with asyncio.timeout(5):
            while not replica.numbers["cancelled"] or replica.numbers["kv_usage"]:
                await asyncio.sleep(0.001)

    with_fleet(test)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "other"}, "model: must be"),
        ({"tidegate": {"privacy": "local"}}, "tidegate.privacy"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "tokens"),
    ],
)
def test_a_call_that_cannot_run_is_refused_here(fields: dict[str, Any], said: str) -> None:
    async def test(backend: RayBackend, fleet: Fleet) -> None:
        with pytest.raises(RequestError, match=said):
            await answered(backend, call(**fields))
        assert fleet.runs == 0

    with_fleet(test)


def test_what_an_engine_refuses_is_refused_with_its_own_words() -> None:
    class Full(Fleet):
        async def answer(self, ask: Ask) -> AsyncGenerator[Part, None]:
            raise CapacityError("nine wait", retry_after_s=9.0)
            yield ()

    async def test(backend: RayBackend, fleet: Fleet) -> None:
        full = RayBackend(
            Full(replicas=fleet.replicas),
            toy_text(context_tokens=128),
            fleet.replicas[0].facts,
        )
        with pytest.raises(CapacityError, match="nine wait") as caught:
            await answered(full, call())
        assert caught.value.retry_after_s == 9.0

    with_fleet(test)


def test_later_runs_have_less_of_the_deadline() -> None:
    async def test(backend: RayBackend, fleet: Fleet) -> None:
        fleet.dies_after = [1]
        backend._pause_s = 0.03
        await answered(backend, call(tidegate={"deadline_ms": 60_000}))
        first, second = (ask.call.options.deadline_ms for ask in fleet.asks)
        assert first is not None
        assert second is not None
        assert second <= first - 30

    with_fleet(test)
