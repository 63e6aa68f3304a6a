"""The shapes that requests ask for: every spelling, the wire, the engine, and what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from httpengine import CHAT, body, streamed, with_engine
from jsonschemas import is_valid
from toyengine import toy_engine

from tidegate.api.schema import Call, call_to_json, read_chat, read_completion
from tidegate.engine.engine import Engine
from tidegate.engine.request import Constraint
from tidegate.errors import RequestError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "lamp": {"type": "string", "minLength": 1, "maxLength": 8},
        "level": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["lamp", "level"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "lamp", "strict": True, "schema": SCHEMA}}


def constraint(**fields: object) -> Constraint | None:
    return read_chat({"messages": [{"role": "user", "content": "x"}], **fields}).constraint


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": FORMAT}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"guided_json": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"structured_outputs": {"regex": "a|b"}}, "regex", "a|b"),
        ({"guided_regex": "a|b"}, "regex", "a|b"),
        ({"structured_outputs": {"choice": ["on", "off"]}}, "choice", '["on", "off"]'),
        ({"guided_choice": ["on", "off"]}, "choice", '["on", "off"]'),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
def test_every_spelling_is_the_same_constraint_and_survives_the_link(
    fields: dict[str, object], kind: str, source: str
) -> None:
    found = constraint(**fields)
    assert found is not None
    assert (found.kind, found.source, found.begun) == (kind, source, "")
    call = read_completion({"prompt": "x", **fields})
    assert read_completion(call_to_json(call)) == call
    assert call.constraint == found


def test_a_free_answer_has_no_constraint() -> None:
    assert constraint() is None
    assert constraint(response_format={"type": "text"}) is None


def test_only_one_shape_can_be_asked_for() -> None:
    with pytest.raises(RequestError) as told:
        constraint(response_format=FORMAT, guided_regex="a")
    assert told.value.field == "guided_regex"
    assert "response_format.json_schema.schema does too" in str(told.value)


def test_an_answer_that_was_begun_elsewhere_keeps_its_beginning_on_the_link() -> None:
    call = read_chat(
        {
            "messages": [{"role": "user", "content": "x"}],
            "structured_outputs": {"json": SCHEMA, "begun": '{"lamp": "a'},
        }
    )
    assert call.constraint is not None
    assert call.constraint.begun == '{"lamp": "a'
    assert read_chat(call_to_json(call)) == call


def asked(**fields: object) -> dict[str, object]:
    return {**body(), "temperature": 1, "max_tokens": 100, **fields}


def test_a_structured_answer_is_valid_whole_and_streamed() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        for seed in range(4):
            wish: dict[str, Any] = {"response_format": FORMAT, "seed": seed, "max_tokens": 100}
            wish["temperature"] = 1
            answer = (await client.post(CHAT, json=body("hello", **wish))).json()["choices"][0]
            assert answer["finish_reason"] == "stop"
            assert is_valid(SCHEMA, json.loads(answer["message"]["content"]))
            chunks = await streamed(client, **wish)
            said = "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks)
            assert said == answer["message"]["content"]

    with_engine(test, toy_engine())


def test_completions_are_constrained_too() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        wish = {"prompt": "a lamp is", "guided_choice": ["on", "off"], "max_tokens": 9}
        answers = [
            (await client.post("/v1/completions", json={**wish, "seed": seed})).json()
            for seed in range(8)
        ]
        assert {one["choices"][0]["text"] for one in answers} <= {"on", "off"}

    with_engine(test, toy_engine())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"properties": {"a": {"type": "array", "uniqueItems": True}}}
            }}},
            "response_format.json_schema.schema.properties.a.uniqueItems",
        ),
        ({"guided_regex": "("}, "guided_regex"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
        ({"guided_choice": ["a"], "min_tokens": 2}, "min_tokens"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_a_400_that_says_where_streamed_or_not(
    fields: dict[str, object], param: str
) -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        for stream in (False, True):
            refused = await client.post(CHAT, json=asked(stream=stream, **fields))
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == param
        assert engine.snapshot().failed == 0

    with_engine(test, toy_engine())


def test_a_grammar_in_the_making_does_not_hold_other_calls_up() -> None:
    """500 properties that may each be left out take about 0.1 s, twenty such grammars 2 s."""

    def wide(number: int) -> Call:
        properties = {f"p{number}_{n}": {"type": "boolean"} for n in range(500)}
        shape = {"json": {"type": "object", "properties": properties}}
        return read_chat({**asked(), "structured_outputs": shape})

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        slow = [asyncio.create_task(engine.prepare(wide(n).constraint)) for n in range(8)]
        free = await client.post(CHAT, json=body(max_tokens=4))
        assert free.status_code == 200
        assert not all(one.done() for one in slow), "it was answered while they compiled"
        await asyncio.gather(*slow)

    with_engine(test, toy_engine())
