"""Five hundred mixed requests: nothing leaks, nothing is lost, memory stays what it was."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from toyengine import PAGED, SLOTS, ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor

from tidegate.engine.engine import Engine
from tidegate.engine.events import Cancelled, Failed, Finished, Terminal
from tidegate.engine.executor import ExecutorStep, PagedGeometry, SlotGeometry
from tidegate.engine.request import Priority, RequestId
from tidegate.engine.settings import EngineSettings
from tidegate.errors import CapacityError

REQUESTS = 500
POISON = 299
POISONED = range(0, REQUESTS, 50)
TIGHT = PagedGeometry(block_tokens=4, blocks=40, bytes_per_token=8)


async def one(engine: Engine, number: int, chance: random.Random) -> type[Terminal]:
    """Submit one request as clients do: try again when full, sometimes leave early."""
    stem = range(10, 10 + chance.choice((0, 0, 16, 40)))
    end = POISON if number in POISONED else 9
    prompt = (*stem, *chance.choices(range(3, 9), k=9), end)
    request = ask(
        f"r{number}",
        prompt,
        max_tokens=chance.randint(1, 30),
        temperature=chance.choice((0.0, 1.0)),
        top_p=chance.choice((0.9, 1.0)),
        seed=number,
        stop=chance.choice(((), ("e",))),
        priority=chance.choice(list(Priority)),
    )
    await asyncio.sleep(chance.random() * 0.5)
    while True:
        try:
            answer = engine.submit(request)
            break
        except CapacityError:
            await asyncio.sleep(0.01)
    if chance.random() < 0.1:
        await asyncio.sleep(chance.random() * 0.01)
        engine.cancel(RequestId(f"r{number}"))
    return type((await collect(answer)).terminal)


@pytest.mark.parametrize("shape", [PAGED, TIGHT, SLOTS])
def test_five_hundred_mixed_requests_leave_nothing_behind(
    shape: PagedGeometry | SlotGeometry,
) -> None:
    chance = random.Random(5)
    steps_that_fail = set(chance.sample(range(3000), 30))

    def fails(step: ExecutorStep) -> bool:
        poisoned = any(POISON in row.tokens for row in step.rows)
        return poisoned or executor.record.steps in steps_that_fail

    executor = ToyExecutor(shape, behaviour=Behaviour(fails=fails))

    async def scenario() -> list[type[Terminal]]:
        settings = EngineSettings(most_waiting=50, chunk_tokens=24)
        async with serving(toy_engine(executor, settings=settings)) as engine:
            ends = await asyncio.gather(
                *(one(engine, number, random.Random(number)) for number in range(REQUESTS))
            )
            assert await engine.drain(5)
            now = engine.snapshot()
            assert (now.running, now.waiting, now.kv_usage) == (0, 0, 0)
            assert now.finished + now.failed + now.cancelled == REQUESTS
            engine._batcher.kv.check_integrity()
            return ends

    started_s = time.perf_counter()
    ends = asyncio.run(scenario())
    failed = {number for number, end in enumerate(ends) if end is Failed}
    assert len(failed) <= len(POISONED) + len(steps_that_fail)
    assert ends.count(Finished) > 400
    assert ends.count(Cancelled) > 0
    assert time.perf_counter() - started_s < 10
