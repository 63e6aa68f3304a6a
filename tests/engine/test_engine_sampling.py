"""Sampling parameters through the whole engine: likelihoods, penalties, least lengths, stop ids."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from toydrafter import ForetellingDrafter
from toyengine import (
    PAGED,
    SHAPES,
    Collected,
    ask,
    collect,
    serving,
    toy_engine,
    with_sampling,
)
from toyexecutor import Behaviour, ToyExecutor, VirtualClock
from toytext import toy_tokenizer

from tidegate.engine.drafts import Drafter
from tidegate.engine.executor import PagedGeometry, SlotGeometry
from tidegate.engine.request import GenerationRequest, SamplingParams
from tidegate.engine.settings import EngineSettings
from tidegate.errors import RequestError

PROMPT = tuple(range(3, 24))
TOKENIZER = toy_tokenizer()


def answered(
    *requests: GenerationRequest,
    executor: ToyExecutor | None = None,
    eos: bool = True,
    settings: EngineSettings | None = None,
    drafters: Sequence[Drafter] | None = None,
) -> list[Collected]:
    async def run() -> list[Collected]:
        made = toy_engine(executor, eos=eos, settings=settings, drafters=drafters)
        async with serving(made) as engine:
            return await asyncio.gather(*(collect(engine.submit(one)) for one in requests))

    return asyncio.run(run())


def test_every_token_is_told_with_its_likelihood_and_its_place_in_the_text() -> None:
    request = with_sampling(ask("a", PROMPT, temperature=1.0, max_tokens=60), logprobs=3)
    (answer,) = answered(request, eos=False)
    assert tuple(one.chosen.token for one in answer.scored) == answer.tokens
    assert all(one.chosen.logprob <= 0 and len(one.top) == 3 for one in answer.scored)
    assert all(
        one.top[0].logprob >= one.top[1].logprob >= one.top[2].logprob for one in answer.scored
    )
    data = b"".join(one.chosen.data for one in answer.scored if one.chosen.token > 2)
    assert data.decode(errors="replace") == answer.text
    for place, one in enumerate(answer.scored):
        before = TOKENIZER.decode(list(answer.tokens[:place]))
        whole = before.rstrip("\ufffd")
        assert len(whole) <= one.text_offset <= len(before)


def test_nobody_who_did_not_ask_is_told_any() -> None:
    (answer,) = answered(ask("a", PROMPT))
    assert answer.tokens
    assert answer.scored == ()


def test_the_tokens_of_a_stop_string_are_not_told_but_counted() -> None:
    free = with_sampling(ask("a", PROMPT, max_tokens=40), logprobs=0)
    (whole,) = answered(free, eos=False)
    # A stop string that begins within the text and spans tokens.
    stop = next(
        whole.text[at : at + 3]
        for at in range(6, len(whole.text) - 3)
        if whole.text[at : at + 3].isascii() and whole.text.find(whole.text[at : at + 3]) == at
    )
    (cut,) = answered(with_sampling(free, stop=(stop,)), eos=False)
    assert cut.finished.reason == "stop"
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert all(one.text_offset < len(cut.text) for one in cut.scored)
    assert cut.scored == whole.scored[: len(cut.scored)]
    assert cut.finished.usage.completion_tokens == len(cut.tokens) > len(cut.scored)


def test_stop_token_ids_end_an_answer_even_when_its_own_ends_are_ignored() -> None:
    free = ask("a", PROMPT, max_tokens=40, ignore_eos=True)
    (whole,) = answered(free)
    token = whole.tokens[5]
    place = whole.tokens.index(token)
    (cut,) = answered(with_sampling(free, stop_token_ids=(token,)))
    assert cut.tokens == whole.tokens[:place], "it has no text and is not told, as an end has none"
    assert cut.finished.reason == "stop"
    assert cut.finished.usage.completion_tokens == place + 1


def test_nothing_ends_an_answer_before_its_least_length() -> None:
    free = ask("a", PROMPT, max_tokens=40)
    (whole,) = answered(free, eos=False)
    early = with_sampling(free, stop=(whole.text[:2],), stop_token_ids=(whole.tokens[0],))
    (stopped,) = answered(early, eos=False)
    assert stopped.finished.usage.completion_tokens <= 2
    (later,) = answered(with_sampling(early, min_tokens=12), eos=False)
    assert later.finished.usage.completion_tokens >= 12
    assert whole.tokens[0] not in later.tokens[:12]


@pytest.mark.parametrize("shape", SHAPES)
def test_penalties_count_alike_alone_batched_and_after_preemption(
    shape: PagedGeometry | SlotGeometry,
) -> None:
    tight = shape
    if isinstance(shape, PagedGeometry):
        tight = PagedGeometry(block_tokens=4, blocks=18, bytes_per_token=8)
    requests = [
        with_sampling(
            ask(f"r{n}", PROMPT[n : n + 10], max_tokens=40, temperature=n % 2, ignore_eos=True),
            presence_penalty=0.4,
            frequency_penalty=0.9,
            repetition_penalty=1.2,
            logit_bias=((50, 3.0),),
            logprobs=1,
        )
        for n in range(4)
    ]
    together = answered(*requests, executor=ToyExecutor(tight))
    for request, answer in zip(requests, together, strict=True):
        (alone,) = answered(request, executor=ToyExecutor(PAGED))
        assert answer.tokens == alone.tokens
        for one, other in zip(answer.scored, alone.scored, strict=True):
            assert math.isclose(one.chosen.logprob, other.chosen.logprob, abs_tol=1e-6)
    free = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    (plain,) = answered(with_sampling(requests[0], **free))
    assert plain.tokens != together[0].tokens


def test_a_frequency_penalty_spreads_an_answer_over_the_vocabulary() -> None:
    free = with_sampling(ask("a", PROMPT, max_tokens=60, ignore_eos=True), logit_bias=((9, 6.0),))
    (stuck,) = answered(free)
    assert set(stuck.tokens) == {9}
    (spread,) = answered(with_sampling(free, frequency_penalty=2.0))
    assert spread.tokens.count(9) <= 6


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"logit_bias": ((300, 1.0),)}, "logit_bias: 300: must be a token id from 0 to 299"),
        ({"stop_token_ids": (7, 999)}, "stop_token_ids: 999: must be a token id from 0 to 299"),
    ],
)
def test_tokens_that_the_model_lacks_are_refused_by_name(
    changed: dict[str, Any], said: str
) -> None:
    async def run() -> None:
        async with serving(toy_engine()) as engine:
            with pytest.raises(RequestError) as refused:
                engine.submit(with_sampling(ask("a", PROMPT), **changed))
            assert said in str(refused.value)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"min_p": 1.5}, "min_p: 1.5: must be between 0 and 1"),
        ({"presence_penalty": -3}, "presence_penalty: -3: must be between -2 and 2"),
        ({"frequency_penalty": 2.1}, "frequency_penalty: 2.1: must be"),
        ({"repetition_penalty": 0}, "repetition_penalty: 0: must be between 0.01 and 10"),
        ({"min_tokens": 11}, "min_tokens: 11: must be between 0 and max_tokens, 10"),
        ({"logit_bias": ((4, 101.0),)}, "logit_bias.4: 101.0: must be between -100 and 100"),
        ({"logit_bias": tuple((n, 0.0) for n in range(301))}, "logit_bias: 301 tokens: must be"),
        ({"stop_token_ids": (1,) * 65}, "stop_token_ids: 65 ids: must be at most 64"),
        ({"logprobs": 21}, "logprobs: 21: must be between 0 and 20"),
        ({"presence_penalty": math.nan}, "presence_penalty: nan: must be"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_value_and_what_is_allowed(
    changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError) as refused:
        replace(SamplingParams(max_tokens=10), **changed)
    assert said in str(refused.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_guessed_tokens_count_for_penalties_and_are_told_as_likely_as_without(
    shape: PagedGeometry | SlotGeometry,
) -> None:
    requests = [
        with_sampling(
            ask(f"r{n}", PROMPT[n : n + 10], max_tokens=40, temperature=n, ignore_eos=True),
            presence_penalty=0.8,
            frequency_penalty=0.9,
            repetition_penalty=1.2,
            min_tokens=30,
            stop_token_ids=(99, 120),
            logprobs=2,
        )
        for n in range(2)
    ]
    plain = EngineSettings(speculation=False)
    expected = [answered(one, settings=plain)[0] for one in requests]
    known = {one.prompt: told.tokens for one, told in zip(requests, expected, strict=True)}
    # A step takes a virtual second, so that guesses always pay.
    toy = ToyExecutor(shape, behaviour=Behaviour(clock=VirtualClock(), step_s=1.0))
    found = answered(*requests, executor=toy, drafters=[ForetellingDrafter(known, right=0.9)])
    assert toy.record.steps < 30, "40 without guesses"
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert [told.text_offset for told in one.scored] == [
            told.text_offset for told in other.scored
        ]
        for told, before in zip(one.scored, other.scored, strict=True):
            assert [top.token for top in told.top] == [top.token for top in before.top]
            assert math.isclose(told.chosen.logprob, before.chosen.logprob, abs_tol=1e-6)
