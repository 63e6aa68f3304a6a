"""The same tokens as alone: batched, chunked, from the prefix cache, after preemption, resumed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toyengine import PAGED, SHAPES, SLOTS, Collected, ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor

from tidegate.engine.executor import PagedGeometry, SlotGeometry
from tidegate.engine.request import GenerationRequest, Priority
from tidegate.engine.settings import EngineSettings

Shape = PagedGeometry | SlotGeometry

FOUR = (
    ask("greedy", tuple(range(3, 24))),
    ask("warm", tuple(range(50, 90)), temperature=0.8, seed=1),
    ask("top-k", (9, 8, 7), temperature=1.0, top_k=5, seed=2),
    ask("nucleus", tuple(range(3, 24)), temperature=1.3, top_p=0.9, seed=3, max_tokens=40),
)


async def together(executor: ToyExecutor, *requests: GenerationRequest) -> list[Collected]:
    """All of them submitted at once."""
    async with serving(toy_engine(executor)) as engine:
        return await asyncio.gather(*(collect(engine.submit(request)) for request in requests))


def alone(request: GenerationRequest) -> Collected:
    """On a fresh engine with nothing to reuse, one prompt in one step."""
    executor = ToyExecutor(PAGED, step_tokens=256, context_tokens=128)
    return asyncio.run(together(executor, request))[0]


def same(one: Collected, other: Collected) -> bool:
    return (one.tokens, one.text, one.finished.reason) == (
        other.tokens,
        other.text,
        other.finished.reason,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_four_requests_batched_give_the_same_tokens_as_alone(shape: Shape) -> None:
    executor = ToyExecutor(shape)
    answers = asyncio.run(together(executor, *FOUR))
    assert executor.record.most_rows == 4
    for request, answer in zip(FOUR, answers, strict=True):
        assert same(answer, alone(request))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step_tokens", [1, 3, 8])
def test_chunked_prefill_gives_the_same_tokens_as_alone(shape: Shape, step_tokens: int) -> None:
    executor = ToyExecutor(shape, step_tokens=step_tokens)
    answers = asyncio.run(together(executor, *FOUR))
    assert max(tokens for rows in executor.record.rows for _, tokens in rows) <= step_tokens
    for request, answer in zip(FOUR, answers, strict=True):
        assert same(answer, alone(request))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prefix_hit_gives_the_same_tokens_as_alone(shape: Shape) -> None:
    async def scenario() -> tuple[Collected, Collected, Collected]:
        async with serving(toy_engine(ToyExecutor(shape))) as engine:
            first = await collect(engine.submit(FOUR[1]))
            again = await collect(engine.submit(replace(FOUR[1])))
            longer = replace(FOUR[1], prompt=(*FOUR[1].prompt, *first.tokens, 5, 6))
            return first, again, await collect(engine.submit(longer))

    first, again, longer = asyncio.run(scenario())
    assert first.finished.usage.cached_tokens == 0
    assert again.finished.usage.cached_tokens >= 36
    assert longer.finished.usage.cached_tokens >= 50
    assert same(first, again)
    prompt = (*FOUR[1].prompt, *first.tokens, 5, 6)
    assert same(longer, alone(replace(FOUR[1], prompt=prompt)))


def test_a_prefix_of_a_request_still_running_is_shared() -> None:
    async def scenario(shape: Shape) -> tuple[Collected, Collected]:
        executor = ToyExecutor(shape)
        async with serving(toy_engine(executor)) as engine:
            first = asyncio.create_task(collect(engine.submit(FOUR[3])))
            while engine.snapshot().generated_tokens < 3:
                await asyncio.sleep(0)
            second = await collect(engine.submit(FOUR[0]))
            return await first, second

    for shape in SHAPES:
        first, second = asyncio.run(scenario(shape))
        assert second.finished.usage.cached_tokens == 20
        assert same(first, alone(FOUR[3]))
        assert same(second, alone(FOUR[0]))


def test_requests_that_preempt_each_other_give_the_same_tokens_as_alone() -> None:
    executor = ToyExecutor(PagedGeometry(block_tokens=4, blocks=18, bytes_per_token=8))
    requests = [
        ask(f"r{n}", tuple(range(n + 3, n + 13)), max_tokens=40, temperature=n % 2, ignore_eos=True)
        for n in range(5)
    ]

    async def scenario() -> tuple[list[Collected], int]:
        async with serving(toy_engine(executor)) as engine:
            answers = await asyncio.gather(*(collect(engine.submit(one)) for one in requests))
            return answers, engine.snapshot().preemptions

    answers, preemptions = asyncio.run(scenario())
    assert preemptions > 0
    for request, answer in zip(requests, answers, strict=True):
        assert same(answer, alone(request))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_interactive_request_does_not_wait_for_a_background_one_and_both_come_out_right(
    shape: Shape,
) -> None:
    executor = ToyExecutor(shape, step_rows=1)
    background = ask("b", FOUR[1].prompt, max_tokens=60, priority=Priority.BACKGROUND)
    urgent = ask("i", FOUR[0].prompt, priority=Priority.INTERACTIVE)

    async def scenario() -> tuple[Collected, Collected, bool]:
        async with serving(toy_engine(executor, eos=False)) as engine:
            slow = asyncio.create_task(collect(engine.submit(background)))
            while engine.snapshot().generated_tokens < 5:
                await asyncio.sleep(0)
            fast = await collect(engine.submit(urgent))
            waited = slow.done()
            return await slow, fast, waited

    slow, fast, waited = asyncio.run(scenario())
    assert not waited
    assert slow.finished.usage.completion_tokens == 60
    reference = asyncio.run(_without_eos(background)), asyncio.run(_without_eos(urgent))
    assert (slow.tokens, fast.tokens) == reference


async def _without_eos(request: GenerationRequest) -> tuple[int, ...]:
    async with serving(toy_engine(eos=False)) as engine:
        return (await collect(engine.submit(request))).tokens


def test_an_answer_handed_over_in_the_middle_goes_on_with_the_same_tokens() -> None:
    whole = ask("whole", FOUR[1].prompt, temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)
    begun = replace(whole, sampling=replace(whole.sampling, max_tokens=8))
    first = alone(begun).tokens
    rest = replace(
        whole,
        prompt=(*whole.prompt, *first),
        sampling=replace(whole.sampling, max_tokens=12),
    )
    assert first + alone(rest).tokens == alone(whole).tokens


def test_the_same_seed_gives_the_same_answer_and_no_seed_a_new_one() -> None:
    def tokens(seed: int | None) -> tuple[int, ...]:
        return alone(ask("r", (5, 6, 7), temperature=1.0, seed=seed, ignore_eos=True)).tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


prompts = st.tuples(st.sampled_from([0, 9, 21, 40]), st.lists(st.integers(3, 5), max_size=12)).map(
    lambda drawn: (*range(10, 11 + drawn[0]), *drawn[1])
)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(
        [PAGED, SLOTS, PagedGeometry(block_tokens=8, blocks=16, bytes_per_token=8)]
    ),
    step_tokens=st.integers(2, 40),
    chunk_tokens=st.none() | st.integers(1, 20),
    asked=st.lists(
        st.tuples(prompts, st.integers(1, 24), st.sampled_from([0.0, 0.7, 1.5]), st.integers(0, 2)),
        min_size=1,
        max_size=7,
    ),
)
def test_whatever_runs_beside_it_every_answer_is_the_one_it_gives_alone(
    shape: Shape,
    step_tokens: int,
    chunk_tokens: int | None,
    asked: list[tuple[tuple[int, ...], int, float, int]],
) -> None:
    requests = [
        ask(f"r{n}", prompt, max_tokens=most, temperature=warmth, seed=n, priority=Priority(order))
        for n, (prompt, most, warmth, order) in enumerate(asked)
    ]

    async def scenario() -> list[Collected]:
        executor = ToyExecutor(shape, step_tokens=step_tokens, behaviour=Behaviour())
        settings = EngineSettings(chunk_tokens=chunk_tokens)
        async with serving(toy_engine(executor, settings=settings)) as engine:
            tasks = []
            for request in requests:
                tasks.append(asyncio.create_task(collect(engine.submit(request))))
                await asyncio.sleep(0.0002)
            return await asyncio.gather(*tasks)

    for request, answer in zip(requests, asyncio.run(scenario()), strict=True):
        assert same(answer, alone(request))
