"""Steps planned while the one before them runs: the same answers, and nothing leaks."""

from __future__ import annotations

import asyncio
import random

import pytest
from toyengine import PAGED, Collected, ask, collect, serving, toy_engine, with_sampling
from toyexecutor import Behaviour, ToyExecutor
from toysampling import PipelinedToy

from tidegate.engine.events import Cancelled, Failed, Finished
from tidegate.engine.executor import ExecutorStep, PagedGeometry
from tidegate.engine.request import Constraint, GenerationRequest, Priority
from tidegate.engine.settings import EngineSettings

PROMPT = tuple(range(3, 24))
TIGHT = PagedGeometry(block_tokens=4, blocks=20, bytes_per_token=8)
PLAIN = EngineSettings(speculation=False)


def requests(count: int, *, seed: int = 0, simple: bool = True) -> list[GenerationRequest]:
    chance = random.Random(seed)
    made = []
    for number in range(count):
        one = ask(
            f"r{number}",
            PROMPT[: chance.randint(1, 21)],
            max_tokens=chance.randint(1, 20),
            temperature=chance.choice((0.0, 1.0)),
            top_p=chance.choice((0.8, 1.0)),
            seed=number,
            stop=chance.choice(((), ("e",))),
            priority=chance.choice(list(Priority)),
        )
        if not simple and chance.random() < 0.3:
            one = with_sampling(one, presence_penalty=1.0)
        elif not simple and chance.random() < 0.2:
            one = with_sampling(one, logprobs=1)
        made.append(one)
    return made


def answers(
    executor: ToyExecutor,
    asked: list[GenerationRequest],
    *,
    settings: EngineSettings = PLAIN,
    staggered: bool = False,
) -> list[Collected]:
    async def scenario() -> list[Collected]:
        engine = toy_engine(executor, settings=settings)
        async with serving(engine):
            for one in asked:
                await engine.prepare(one.constraint)
            started = []
            for one in asked:
                started.append(asyncio.create_task(collect(engine.submit(one))))
                if staggered:
                    await asyncio.sleep(0.002)
            return list(await asyncio.gather(*started))

    return asyncio.run(scenario())


def told(found: list[Collected]) -> list[tuple[tuple[int, ...], str, str]]:
    return [(one.tokens, one.text, type(one.terminal).__name__) for one in found]


def test_the_next_step_begins_before_the_last_ones_tokens_are_known() -> None:
    executor = PipelinedToy(PAGED)
    asked = requests(6)
    assert told(answers(executor, asked)) == told(answers(ToyExecutor(PAGED), asked))
    assert executor.most_pending == 2
    assert executor.fed > 30


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize("geometry", [PAGED, TIGHT])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_requests_that_come_and_go_get_what_they_would_alone(
    geometry: PagedGeometry, simple: bool, seed: int
) -> None:
    """On little KV some are preempted, which is never done while a step runs."""
    asked = requests(24, seed=seed, simple=simple)
    executor = PipelinedToy(geometry)
    found = told(answers(executor, asked, staggered=seed == 3))
    assert found == told(answers(ToyExecutor(geometry), asked))
    assert executor.fed > 10 or not simple


def test_who_leaves_while_two_steps_run_leaves_nothing_behind() -> None:
    async def scenario() -> tuple[Collected, Collected]:
        executor = PipelinedToy(PAGED)
        executor.behaviour = Behaviour(step_s=0.002)
        engine = toy_engine(executor, settings=PLAIN, eos=False)
        async with serving(engine):
            first = engine.submit(ask("first", PROMPT, max_tokens=60))
            other = engine.submit(ask("other", PROMPT, max_tokens=60))
            left = asyncio.create_task(collect(first))
            stayed = asyncio.create_task(collect(other))
            while engine.snapshot().generated_tokens < 20:
                await asyncio.sleep(0.001)
            engine.cancel(ask("first", PROMPT).id)
            both = await left, await stayed
            async with asyncio.timeout(5):
                while engine.snapshot().kv_usage:  # the step behind the last may still run
                    await asyncio.sleep(0.001)
        assert executor.most_pending == 2
        return both

    left, stayed = asyncio.run(scenario())
    assert isinstance(left.terminal, Cancelled)
    alone = answers(ToyExecutor(PAGED), [ask("other", PROMPT, max_tokens=60)])
    assert isinstance(stayed.terminal, Finished)
    assert stayed.tokens[: len(alone[0].tokens)] == alone[0].tokens


def test_a_step_that_fails_costs_its_culprit_alone_though_another_was_behind_it() -> None:
    def fails(step: ExecutorStep) -> bool:
        return any(99 in row.tokens for row in step.rows)

    asked = [*requests(5), ask("poisoned", (*PROMPT, 99), max_tokens=5)]
    executor = PipelinedToy(PAGED)
    executor.behaviour = Behaviour(fails=fails)
    found = answers(executor, asked, staggered=True)
    assert isinstance(found[-1].terminal, Failed)
    assert told(found[:-1]) == told(answers(ToyExecutor(PAGED), asked[:-1]))


def test_a_grammar_beside_others_is_never_planned_ahead_of() -> None:
    guided = ask(
        "guided",
        PROMPT,
        max_tokens=20,
        temperature=1.0,
        constraint=Constraint(kind="regex", source="[a-d]{3,9}(no|yes)"),
    )
    asked = [*requests(4), guided, *requests(9, seed=5)[4:]]
    executor = PipelinedToy(PAGED)
    found = answers(executor, asked, staggered=True)
    assert told(found) == told(answers(ToyExecutor(PAGED), asked))
    assert executor.fed > 0
