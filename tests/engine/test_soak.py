"""Five hundred mixed requests: nothing leaks, nothing is lost, memory stays what it was."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import pytest
from toydrafter import ForetellingDrafter
from toyengine import PAGED, SLOTS, Collected, ask, collect, serving, toy_engine, with_sampling
from toyexecutor import Behaviour, ToyExecutor, VirtualClock

from tidegate.engine.drafts import Drafter
from tidegate.engine.engine import Engine
from tidegate.engine.events import Cancelled, Failed, Finished
from tidegate.engine.executor import ExecutorStep, PagedGeometry, SlotGeometry
from tidegate.engine.request import GenerationRequest, Priority, RequestId
from tidegate.engine.settings import EngineSettings
from tidegate.engine.snapshot import EngineSnapshot
from tidegate.errors import CapacityError

REQUESTS = 500
POISON = 299
POISONED = range(0, REQUESTS, 50)
TIGHT = PagedGeometry(block_tokens=4, blocks=40, bytes_per_token=8)


def request_of(number: int, chance: random.Random) -> GenerationRequest:
    """A request of any kind; its number decides its seed."""
    stem = range(10, 10 + chance.choice((0, 0, 16, 40)))
    end = POISON if number in POISONED else 9
    prompt = (*stem, *chance.choices(range(3, 9), k=9), end)
    plain = ask(
        f"r{number}",
        prompt,
        max_tokens=chance.randint(1, 30),
        temperature=chance.choice((0.0, 1.0)),
        top_p=chance.choice((0.9, 1.0)),
        seed=number,
        stop=chance.choice(((), ("e",))),
        priority=chance.choice(list(Priority)),
    )
    if chance.random() < 0.5:
        return plain
    return with_sampling(
        plain,
        presence_penalty=chance.choice((0.0, 0.7)),
        repetition_penalty=chance.choice((1.0, 1.2)),
        logit_bias=chance.choice(((), ((20, 2.0), (30, -100.0)))),
        min_p=chance.choice((0.0, 0.05)),
        min_tokens=chance.randint(0, plain.sampling.max_tokens),
        logprobs=chance.choice((None, 0, 3)),
    )


async def one(engine: Engine, number: int, chance: random.Random) -> Collected:
    """Submit one request as clients do: try again when full, sometimes leave early."""
    request = request_of(number, chance)
    await asyncio.sleep(chance.random() * 0.5)
    while True:
        try:
            answer = engine.submit(request)
            break
        except CapacityError:
            await asyncio.sleep(0.1)  # asking ten times as often is half of the work of this test
    if chance.random() < 0.1:
        await asyncio.sleep(chance.random() * 0.01)
        engine.cancel(RequestId(f"r{number}"))
    return await collect(answer)


async def everything(
    shape: PagedGeometry | SlotGeometry, drafters: Sequence[Drafter], *, speculation: bool
) -> tuple[list[Collected], EngineSnapshot]:
    """All requests, some of which poison their steps, while other steps fail for no reason."""
    steps_that_fail = set(random.Random(5).sample(range(3000), 30))

    def fails(step: ExecutorStep) -> bool:
        poisoned = any(POISON in row.tokens for row in step.rows)
        return poisoned or executor.record.steps in steps_that_fail

    # steps that cost what they cost: whether guessing pays must not hang on who else is busy
    behaviour = Behaviour(fails=fails, clock=VirtualClock(), step_s=1e-3, token_s=1e-5)
    executor = ToyExecutor(shape, behaviour=behaviour)
    settings = EngineSettings(most_waiting=50, chunk_tokens=24, speculation=speculation)
    async with serving(toy_engine(executor, settings=settings, drafters=drafters)) as engine:
        ends = await asyncio.gather(
            *(one(engine, number, random.Random(number)) for number in range(REQUESTS))
        )
        assert await engine.drain(5)
        now = engine.snapshot()
        assert (now.running, now.waiting, now.kv_usage) == (0, 0, 0)
        assert now.finished + now.failed + now.cancelled == REQUESTS
        engine._batcher.kv.check_integrity()
        return ends, now


@pytest.mark.parametrize("shape", [PAGED, TIGHT, SLOTS])
def test_five_hundred_mixed_requests_leave_nothing_behind_and_guesses_change_no_token(
    shape: PagedGeometry | SlotGeometry,
) -> None:
    started_s = time.process_time()
    plain, _ = asyncio.run(everything(shape, (), speculation=False))
    answers = {
        request_of(number, random.Random(number)).prompt: end.tokens
        for number, end in enumerate(plain)
    }
    drafter = ForetellingDrafter(answers, right=0.9)
    guessed, now = asyncio.run(everything(shape, (drafter,), speculation=True))
    for ends in (plain, guessed):
        kinds = [type(end.terminal) for end in ends]
        assert kinds.count(Failed) <= len(POISONED) + 30
        assert kinds.count(Finished) > 400
        assert kinds.count(Cancelled) > 0
    assert now.accepted_draft_tokens > 200
    for one_end, other in zip(plain, guessed, strict=True):
        if isinstance(one_end.terminal, Finished) and isinstance(other.terminal, Finished):
            assert one_end.tokens == other.tokens
    assert time.process_time() - started_s < 20, "of this process alone: others may be busy"
