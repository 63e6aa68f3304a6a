"""Constrained requests in the engine: valid whatever the model says, and nobody else's trouble."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschemas import Schema, is_valid, schemas
from toyengine import PAGED, SHAPES, SLOTS, Collected, ask, collect, serving, toy_engine
from toyexecutor import Behaviour, ToyExecutor

from tidegate.engine.engine import Engine
from tidegate.engine.events import Cancelled, Failed
from tidegate.engine.executor import ExecutorStep, PagedGeometry, SlotGeometry
from tidegate.engine.request import Constraint, GenerationRequest, RequestId
from tidegate.errors import RequestError

Shape = PagedGeometry | SlotGeometry

PROMPT = tuple(range(3, 24))
ROOMY = PagedGeometry(block_tokens=4, blocks=800, bytes_per_token=8)
TIGHT = PagedGeometry(block_tokens=4, blocks=40, bytes_per_token=8)
LAMP: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 4, "maxLength": 12},
        "levels": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 255},
            "minItems": 0,
            "maxItems": 4,
        },
        "on": {"type": "boolean"},
    },
    "required": ["name", "levels", "on"],
    "additionalProperties": False,
}


def shaped(schema: Schema) -> Constraint:
    return Constraint(kind="json_schema", source=json.dumps(schema))


def lamp(name: str, seed: int, **wishes: float) -> GenerationRequest:
    return ask(
        name,
        PROMPT,
        max_tokens=int(wishes.get("max_tokens", 90)),
        temperature=wishes.get("temperature", 1.0),
        seed=seed,
        constraint=shaped(LAMP),
    )


async def said(engine: Engine, request: GenerationRequest) -> Collected:
    await engine.prepare(request.constraint)
    return await collect(engine.submit(request))


def together(
    requests: Sequence[GenerationRequest], executor: ToyExecutor | None = None
) -> list[Collected]:
    async def scenario() -> list[Collected]:
        async with serving(toy_engine(executor)) as engine:
            return await asyncio.gather(*(said(engine, request) for request in requests))

    return asyncio.run(scenario())


def alone(request: GenerationRequest, shape: Shape = PAGED) -> Collected:
    return together([request], ToyExecutor(shape))[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(schemas(), min_size=1, max_size=4), st.sampled_from([0.0, 1.0]), st.integers(0, 99))
def test_a_model_that_answers_at_random_answers_every_schema(
    drawn: list[Schema], temperature: float, seed: int
) -> None:
    executor = ToyExecutor(ROOMY, context_tokens=700)
    requests = [
        ask(
            f"r{place}",
            (3 + place, 5),
            max_tokens=600,
            temperature=temperature,
            seed=seed,
            constraint=shaped(schema),
        )
        for place, schema in enumerate(drawn)
    ]
    for schema, answer in zip(drawn, together(requests, executor), strict=True):
        assert answer.finished.reason == "stop"
        assert is_valid(schema, json.loads(answer.text)), answer.text


@pytest.mark.parametrize("shape", SHAPES)
def test_free_and_constrained_requests_share_a_batch_and_answer_as_if_alone(shape: Shape) -> None:
    free = [ask(f"free{n}", (9, 3 + n), max_tokens=40, temperature=1, seed=n) for n in range(3)]
    lamps = [lamp(f"lamp{n}", n) for n in range(3)]
    requests = [one for pair in zip(free, lamps, strict=True) for one in pair]
    executor = ToyExecutor(shape)
    answers = together(requests, executor)
    assert executor.record.most_rows > 2
    for request, answer in zip(requests, answers, strict=True):
        assert answer.text == alone(request, shape).text
        if request.constraint is not None:
            assert is_valid(LAMP, json.loads(answer.text))


def test_a_preempted_answer_goes_on_in_the_middle_of_its_json() -> None:
    async def scenario() -> tuple[list[Collected], int]:
        async with serving(toy_engine(ToyExecutor(TIGHT))) as engine:
            answers = await asyncio.gather(*(said(engine, lamp(f"r{n}", n)) for n in range(6)))
            return answers, engine.snapshot().preemptions

    answers, preemptions = asyncio.run(scenario())
    assert preemptions > 0
    for n, answer in enumerate(answers):
        assert answer.text == alone(lamp(f"r{n}", n)).text
        assert is_valid(LAMP, json.loads(answer.text))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_failed_step_moves_no_guide(shape: Shape) -> None:
    steps = 0

    def fails(step: ExecutorStep) -> bool:
        nonlocal steps
        steps += 1
        return steps % 7 == 0

    requests = [lamp(f"r{n}", n) for n in range(3)]
    answers = together(requests, ToyExecutor(shape, behaviour=Behaviour(fails=fails)))
    assert steps > 7
    whole = [answer for answer in answers if not isinstance(answer.terminal, Failed)]
    assert whole, "only who failed alone is given up"
    for request, answer in zip(requests, answers, strict=True):
        if answer in whole:
            assert answer.text == alone(request, shape).text


def test_guessing_ahead_changes_the_steps_of_a_constrained_answer_and_nothing_else() -> None:
    def steps_and_text(*, speculation: bool) -> tuple[int, list[str]]:
        executor = ToyExecutor(PAGED)
        requests = [
            replace(lamp(f"r{n}", n, temperature=n % 2), speculation=speculation) for n in range(4)
        ]
        answers = together(requests, executor)
        return executor.record.steps, [answer.text for answer in answers]

    plain_steps, plain = steps_and_text(speculation=False)
    guessing_steps, guessing = steps_and_text(speculation=True)
    assert guessing == plain
    assert guessing_steps < plain_steps


def test_an_answer_cut_in_the_middle_of_its_json_says_length() -> None:
    answer = alone(lamp("r", 1, max_tokens=12))
    assert answer.finished.reason == "length"
    assert alone(lamp("r", 1)).text.startswith(answer.text)
    with pytest.raises(ValueError, match="line 1"):
        json.loads(answer.text)


def test_a_constrained_request_that_is_cancelled_leaves_nothing_behind() -> None:
    async def scenario() -> Collected:
        async with serving(toy_engine()) as engine:
            request = lamp("r", 1)
            await engine.prepare(request.constraint)
            answer = engine.submit(request)
            await anext(answer)
            engine.cancel(RequestId("r"))
            other = await said(engine, lamp("s", 2))
            assert is_valid(LAMP, json.loads(other.text))
            return await collect(answer)

    assert isinstance(asyncio.run(scenario()).terminal, Cancelled)


def test_a_bad_grammar_is_its_own_requests_error_only() -> None:
    async def scenario() -> list[Collected | BaseException]:
        async with serving(toy_engine(ToyExecutor(SLOTS))) as engine:
            wrong = ask("wrong", PROMPT, constraint=shaped({"not": {}}))
            good = (lamp("a", 1), ask("b", PROMPT))
            work = (said(engine, request) for request in (wrong, *good))
            return await asyncio.gather(*work, return_exceptions=True)

    wrong, structured, free = asyncio.run(scenario())
    assert isinstance(wrong, RequestError)
    assert wrong.field == "constraint.not"
    assert isinstance(structured, Collected)
    assert structured.text == alone(lamp("a", 1)).text
    assert isinstance(free, Collected)
    assert free.text == alone(ask("b", PROMPT)).text


def test_a_grammar_that_grows_too_complex_on_the_way_ends_its_own_request_only() -> None:
    """Every piece may be left out, so there are ever more places to be in."""
    source = f"start: X X {'X? ' * 2500}\nX: /[a-z]/"
    monster = Constraint(kind="grammar", source=source, name="grammar")

    async def scenario() -> list[Collected]:
        async with serving(toy_engine()) as engine:
            requests = (ask("wrong", PROMPT, constraint=monster), lamp("a", 1))
            return await asyncio.gather(*(said(engine, request) for request in requests))

    wrong, structured = asyncio.run(scenario())
    assert isinstance(wrong.terminal, Failed)
    assert wrong.terminal.code == "invalid_request"
    assert "grammar: the grammar cannot go on: " in wrong.terminal.message
    assert structured.text == alone(lamp("a", 1)).text


def test_a_constraint_ends_where_its_grammar_says_so_and_nowhere_else() -> None:
    with pytest.raises(RequestError, match="ignore_eos: true: must be false with constraint"):
        ask("r", PROMPT, ignore_eos=True, constraint=shaped(LAMP))
