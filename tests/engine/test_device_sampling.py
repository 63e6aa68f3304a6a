"""An executor that chooses tokens itself: the same answers, whatever they ask for."""

from __future__ import annotations

import asyncio

import numpy as np
from toydrafter import ForetellingDrafter
from toyengine import PAGED, Collected, ask, collect, serving, toy_engine, with_sampling
from toyexecutor import Behaviour, ToyExecutor
from toysampling import SamplingToy

from tidegate.engine.events import Failed
from tidegate.engine.executor import ExecutorStep, Logits
from tidegate.engine.request import Constraint, GenerationRequest

PROMPT = tuple(range(3, 24))
REQUESTS: dict[str, GenerationRequest] = {
    "greedy": ask("greedy", PROMPT),
    "warm": ask("warm", PROMPT, temperature=1.0),
    "narrow": ask("narrow", PROMPT[:9], temperature=0.8, top_k=5, top_p=0.7),
    "penalised": with_sampling(
        ask("penalised", PROMPT, temperature=0.7), presence_penalty=1.0, repetition_penalty=1.3
    ),
    "biased": with_sampling(ask("biased", PROMPT), logit_bias=((7, 4.0),), min_tokens=4),
    "scored": with_sampling(ask("scored", PROMPT), logprobs=2),
    "guided": ask(
        "guided",
        PROMPT,
        max_tokens=40,
        temperature=1.0,
        constraint=Constraint(kind="regex", source="[a-d]{3,9}(no|yes)"),
    ),
}


def answers(executor: ToyExecutor, *, drafter: ForetellingDrafter | None = None) -> list[Collected]:
    """All requests at once."""

    async def scenario() -> list[Collected]:
        drafters = None if drafter is None else [drafter]
        async with serving(toy_engine(executor, drafters=drafters)) as engine:
            for request in REQUESTS.values():
                await engine.prepare(request.constraint)
            started = [engine.submit(request) for request in REQUESTS.values()]
            return list(await asyncio.gather(*(collect(one) for one in started)))

    return asyncio.run(scenario())


def told(found: list[Collected]) -> list[tuple[tuple[int, ...], str, int]]:
    return [(one.tokens, one.text, len(one.scored)) for one in found]


def test_every_request_gets_the_tokens_that_the_host_would_choose() -> None:
    executor = SamplingToy(PAGED)
    assert told(answers(executor)) == told(answers(ToyExecutor(PAGED)))
    assert executor.counted.drawn > 5 * 16
    assert executor.counted.handed_over >= 16, "who wants likelihoods gets logits"
    assert executor.counted.masked > 3, "a grammar's mask goes to the device"


def test_rows_that_the_device_cannot_draw_share_a_step_with_those_it_can() -> None:
    executor = SamplingToy(PAGED, can=lambda draw: draw.params.temperature == 0)
    assert told(answers(executor)) == told(answers(ToyExecutor(PAGED)))
    assert executor.counted.drawn > 16
    assert executor.counted.handed_over > 16


def test_guesses_are_verified_with_the_draws_of_their_positions() -> None:
    plain = answers(ToyExecutor(PAGED))
    texts = {
        (*request.prompt, *one.tokens[:1]): one.tokens[1:]
        for request, one in zip(REQUESTS.values(), plain, strict=True)
    }
    drafter = ForetellingDrafter(texts, right=0.8)
    executor = SamplingToy(PAGED)
    found = answers(executor, drafter=drafter)
    assert told(found) == told(plain)
    assert sum(one.finished.usage.accepted_draft_tokens for one in found) > 10


def test_logits_that_are_no_numbers_end_their_request_alone() -> None:
    def breaks(step: ExecutorStep, logits: Logits) -> Logits:
        if len(step.rows) == 2 and step.rows[0].past > 25:
            logits[0] = np.nan
        return logits

    async def scenario() -> list[Collected]:
        executor = SamplingToy(PAGED)
        executor.behaviour = Behaviour(distorts=breaks)
        async with serving(toy_engine(executor, eos=False, drafters=[])) as engine:
            started = [engine.submit(ask(name, PROMPT)) for name in ("first", "second")]
            return list(await asyncio.gather(*(collect(one) for one in started)))

    ended, other = asyncio.run(scenario())
    assert isinstance(ended.terminal, Failed)
    assert "not numbers" in ended.terminal.message
    assert other.finished.reason == "length"
