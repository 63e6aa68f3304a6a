"""Guessing ahead: the same tokens in fewer steps, whoever guesses and whatever goes wrong."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toydrafter import ForetellingDrafter
from toyengine import PAGED, SHAPES, SLOTS, Collected, ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor, VirtualClock

from tidegate.engine.drafts import Draft, Drafter, Ended, Wish
from tidegate.engine.events import Finished
from tidegate.engine.executor import ExecutorStep, Logits, PagedGeometry, SlotGeometry
from tidegate.engine.request import GenerationRequest, Priority
from tidegate.engine.settings import EngineSettings
from tidegate.engine.snapshot import EngineSnapshot

Shape = PagedGeometry | SlotGeometry

PLAIN = EngineSettings(speculation=False)
FOUR = (
    ask("greedy", tuple(range(3, 24)), max_tokens=40, ignore_eos=True),
    ask("warm", tuple(range(50, 90)), temperature=0.8, seed=1, max_tokens=40, ignore_eos=True),
    ask("short", (9, 8, 7), temperature=1.0, top_k=5, seed=2),
    ask("long", tuple(range(3, 24)), temperature=1.3, top_p=0.9, seed=3, max_tokens=60),
)


def executor(shape: Shape, behaviour: Behaviour | None = None) -> ToyExecutor:
    """A toy on which every step takes a virtual second, so that guesses always pay."""
    behaviour = replace(behaviour or Behaviour(), clock=VirtualClock(), step_s=1.0)
    return ToyExecutor(shape, behaviour=behaviour)


async def together(
    toy: ToyExecutor,
    requests: Sequence[GenerationRequest],
    *,
    drafters: Sequence[Drafter] | None = None,
    settings: EngineSettings | None = None,
) -> tuple[list[Collected], EngineSnapshot]:
    """All of them at once, and what the engine counted; its books hold in the end."""
    async with serving(toy_engine(toy, settings=settings, drafters=drafters)) as engine:
        answers = await asyncio.gather(*(collect(engine.submit(one)) for one in requests))
        engine._batcher.kv.check_integrity()
        return answers, engine.snapshot()


def alone(request: GenerationRequest, behaviour: Behaviour | None = None) -> Collected:
    """On an engine of its own that guesses nothing; asked once where nothing else happens."""
    assert request.sampling.seed is not None
    return _plainly(request) if behaviour is None else _computed_alone(request, behaviour)


@functools.cache
def _plainly(request: GenerationRequest) -> Collected:
    return _computed_alone(request, Behaviour())


def _computed_alone(request: GenerationRequest, behaviour: Behaviour) -> Collected:
    return asyncio.run(together(executor(PAGED, behaviour), [request], settings=PLAIN))[0][0]


def foretelling(requests: Sequence[GenerationRequest], right: float) -> ForetellingDrafter:
    """Who knows the answers of `requests`, with what comes after they stop."""
    longer = [
        replace(one, sampling=replace(one.sampling, max_tokens=80, ignore_eos=True))
        for one in requests
    ]
    return ForetellingDrafter({one.prompt: alone(one).tokens for one in longer}, right=right)


def same(one: Collected, other: Collected) -> bool:
    return (one.tokens, one.text, one.finished.reason) == (
        other.tokens,
        other.text,
        other.finished.reason,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_guesses_that_mostly_hold_give_the_same_tokens_in_far_fewer_steps(shape: Shape) -> None:
    toy, requests = executor(shape), FOUR[:3]
    answers, now = asyncio.run(together(toy, requests, drafters=[foretelling(requests, 0.9)]))
    for request, answer in zip(requests, answers, strict=True):
        assert same(answer, alone(request))
    assert toy.record.steps < 25, "40 without guesses"
    assert now.accepted_draft_tokens > 40
    assert now.draft_tokens > now.accepted_draft_tokens
    used = [answer.finished.usage for answer in answers]
    assert sum(one.accepted_draft_tokens for one in used) == now.accepted_draft_tokens
    rejected = sum(one.rejected_draft_tokens for one in used)
    assert rejected == now.draft_tokens - now.accepted_draft_tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_one_right_guess_after_the_other_is_a_step_of_sixteen(shape: Shape) -> None:
    toy, requests = executor(shape), FOUR[:1]
    asyncio.run(together(toy, requests, drafters=[foretelling(requests, 1.0)]))
    assert max(tokens for rows in toy.record.rows[1:] for _, tokens in rows) == 16
    assert toy.record.steps <= 8


def few_tokens(step: ExecutorStep, logits: Logits) -> Logits:
    """A model that says three words only, so that it often repeats itself."""
    logits = logits.copy()
    logits[:, 13:] = -np.inf
    logits[:, :10] = -np.inf
    return logits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompt_lookup_gives_the_same_tokens_and_is_on_by_default(
    shape: Shape, temperature: float
) -> None:
    requests = [
        ask(f"r{n}", (10, 11, 12, n), max_tokens=60, temperature=temperature) for n in range(3)
    ]
    behaviour = Behaviour(distorts=few_tokens)
    toy = executor(shape, behaviour)
    answers, now = asyncio.run(together(toy, requests))
    assert now.accepted_draft_tokens > 10
    for request, answer in zip(requests, answers, strict=True):
        assert same(answer, alone(request, behaviour))


def test_nothing_is_guessed_for_a_request_that_opted_out_or_when_switched_off() -> None:
    requests = [FOUR[0], replace(FOUR[1], speculation=False)]
    drafter = foretelling(requests, 1.0)
    answers, _ = asyncio.run(together(executor(PAGED), requests, drafters=[drafter]))
    assert answers[0].finished.usage.accepted_draft_tokens > 0
    assert answers[1].finished.usage.accepted_draft_tokens == 0
    _, now = asyncio.run(together(executor(PAGED), requests, drafters=[drafter], settings=PLAIN))
    assert now.draft_tokens == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_guessed_tokens_that_held_are_reused_as_a_prefix_and_others_are_not(shape: Shape) -> None:
    drafter = foretelling(FOUR[:1], 0.8)

    async def scenario() -> tuple[Collected, Collected]:
        toy = executor(shape)
        async with serving(toy_engine(toy, drafters=[drafter])) as engine:
            first = await collect(engine.submit(FOUR[0]))
            again = replace(FOUR[0], prompt=(*FOUR[0].prompt, *first.tokens, 5))
            return first, await collect(engine.submit(again))

    first, again = asyncio.run(scenario())
    whole = len(FOUR[0].prompt) + 39  # the last token's KV was never computed
    assert again.finished.usage.cached_tokens >= whole - 3
    prompt = (*FOUR[0].prompt, *first.tokens, 5)
    assert same(again, alone(replace(FOUR[0], prompt=prompt)))


def test_a_guess_beyond_the_end_is_not_part_of_the_answer() -> None:
    stopping = ask("stop", tuple(range(3, 24)), max_tokens=60)
    longer = replace(stopping, sampling=replace(stopping.sampling, ignore_eos=True))
    tokens = alone(longer).tokens
    for end in (7, 13):
        text = alone(replace(longer, sampling=replace(longer.sampling, max_tokens=end + 1))).text
        request = replace(longer, sampling=replace(longer.sampling, stop=(text[-2:],)))
        drafter = ForetellingDrafter({request.prompt: tokens}, right=1.0)
        answers, _ = asyncio.run(together(executor(PAGED), [request], drafters=[drafter]))
        assert same(answers[0], alone(request))


@pytest.mark.parametrize("blocks", [17, 18, 24])
def test_guesses_with_hardly_any_room_preempt_nobody_more_and_change_no_token(
    blocks: int,
) -> None:
    shape = PagedGeometry(block_tokens=4, blocks=blocks, bytes_per_token=8)
    requests = [
        ask(f"r{n}", tuple(range(n + 3, n + 13)), max_tokens=40, temperature=n % 2, ignore_eos=True)
        for n in range(4)
    ]
    drafter = foretelling(requests, 0.8)
    answers, now = asyncio.run(together(executor(shape), requests, drafters=[drafter]))
    assert now.accepted_draft_tokens > 0
    assert now.preemptions > 0
    for request, answer in zip(requests, answers, strict=True):
        assert same(answer, alone(request))


class Broken:
    """A drafter with a defect."""

    def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
        raise ZeroDivisionError("secret")

    def observe(self, key: int, accepted: int) -> None:
        raise AssertionError(key)

    def remember(self, ended: Ended) -> None:
        raise ZeroDivisionError(ended.key)


def test_a_broken_drafter_costs_nobody_an_answer() -> None:
    answers, now = asyncio.run(together(executor(PAGED), FOUR, drafters=[Broken()]))
    assert now.draft_tokens == 0
    assert now.failed_steps == 0
    for request, answer in zip(FOUR, answers, strict=True):
        assert same(answer, alone(request))


def test_a_step_that_fails_because_of_a_guess_is_done_again_without_one() -> None:
    def fails(step: ExecutorStep) -> bool:
        return any(row.logits > 1 for row in step.rows)

    requests = FOUR[:2]
    toy = executor(PAGED, Behaviour(fails=fails))
    answers, now = asyncio.run(together(toy, requests, drafters=[foretelling(requests, 1.0)]))
    assert now.failed_steps > 0
    for request, answer in zip(requests, answers, strict=True):
        assert same(answer, alone(request))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(
        [PAGED, SLOTS, PagedGeometry(block_tokens=8, blocks=14, bytes_per_token=8)]
    ),
    right=st.sampled_from([0.2, 0.6, 0.95]),
    asked=st.lists(
        st.tuples(
            st.integers(1, 30), st.integers(1, 50), st.sampled_from([0.0, 1.0]), st.integers(0, 2)
        ),
        min_size=1,
        max_size=6,
    ),
    leaves=st.sets(st.integers(0, 5), max_size=1),
)
def test_whatever_is_guessed_every_answer_is_the_one_it_gives_alone(
    shape: Shape, right: float, asked: list[tuple[int, int, float, int]], leaves: set[int]
) -> None:
    requests = [
        ask(
            f"r{n}",
            (*range(10, 10 + prompt), 3 + n),
            max_tokens=most,
            temperature=warmth,
            seed=n,
            priority=Priority(order),
        )
        for n, (prompt, most, warmth, order) in enumerate(asked)
    ]

    drafter = foretelling(requests, right)

    async def scenario() -> list[Collected]:
        async with serving(toy_engine(executor(shape), drafters=[drafter])) as engine:
            tasks = []
            for number, request in enumerate(requests):
                tasks.append(asyncio.create_task(collect(engine.submit(request))))
                await asyncio.sleep(0.0003)
                if number in leaves:
                    engine.cancel(request.id)
            return await asyncio.gather(*tasks)

    for number, (request, answer) in enumerate(zip(requests, asyncio.run(scenario()), strict=True)):
        if number not in leaves or isinstance(answer.terminal, Finished):
            assert same(answer, alone(request))
