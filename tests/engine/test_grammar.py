"""Grammars compile beside the loop, within bounds; what cannot be enforced is refused by name."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from jsonschemas import Schema, is_valid, schemas
from tokenizers import Tokenizer, models
from toytext import VOCAB, toy_text

from tidegate.engine.grammar import Grammars
from tidegate.engine.grammar_source import GrammarLimits
from tidegate.engine.request import Constraint, ConstraintKind
from tidegate.engine.text import TextModel
from tidegate.errors import CapacityError, ConfigError, RequestError, UnavailableError

GRAMMARS = Grammars(toy_text(), vocab=VOCAB)


def constrained(kind: ConstraintKind, source: object) -> Constraint:
    text = source if isinstance(source, str) else json.dumps(source)
    return Constraint(kind=kind, source=text, name="schema")


def refusal(
    kind: ConstraintKind, source: object, limits: GrammarLimits | None = None
) -> RequestError:
    grammars = GRAMMARS if limits is None else Grammars(toy_text(), vocab=VOCAB, limits=limits)
    with pytest.raises(RequestError) as told:
        asyncio.run(grammars.prepare(constrained(kind, source)))
    return told.value


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"type": "array", "uniqueItems": True}, "schema.uniqueItems"),
        ({"properties": {"a": {"not": {}}}}, "schema.properties.a.not"),
        ({"anyOf": [{}, {"items": {"if": {}}}]}, "schema.anyOf.1.items.if"),
        ({"$defs": {"x": {"maxlength": 3}}}, "schema.$defs.x.maxlength"),
        ({"type": "string", "nullable": True}, "schema.nullable"),
        ({"x-guidance": {"lenient": True}}, "schema.x-guidance"),
        ({"items": [{}]}, "schema.items"),
        ({"minLength": "3"}, "schema.minLength"),
        ({"minimum": 1, "exclusiveMinimum": True}, "schema.exclusiveMinimum"),
        ({"enum": []}, "schema.enum"),
        ({"properties": []}, "schema.properties"),
        ({"allOf": {}}, "schema.allOf"),
        ({"additionalProperties": "no"}, "schema.additionalProperties"),
        ({"type": "strin"}, "schema"),
        ({"properties": {"a": {"items": {"type": "string", "pattern": "("}}}},
         "schema.properties.a.items"),
        ({"properties": {"when": {"type": "string", "format": "moon"}}}, "schema.properties.when"),
        ({"$ref": "#/nowhere"}, "schema"),
        ({"$ref": "https://example.org/schema.json"}, "schema"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "schema"),
        (False, "schema"),
        ([], "schema"),
        ('{"type": ', "schema"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_refused_at_its_place(
    schema: object, field: str
) -> None:
    error = refusal("json_schema", schema)
    assert (error.field, error.status) == (field, 400)


def test_keywords_that_say_nothing_about_validity_are_no_reason_to_refuse() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/lamp",
        "title": "Lamp",
        "description": "a lamp",
        "x-ours": {"any": "thing"},
        "properties": {"not": {"type": "boolean", "default": False, "examples": [True]}},
    }
    asyncio.run(GRAMMARS.prepare(constrained("json_schema", schema)))


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("regex", "a(", "unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("grammar", 'start: "a" other', "unknown name"),
        ("grammar", 'begin: "a"', "no start rule"),
        ("choice", [], "1 to 1024 strings"),
        ("choice", ["a", ""], "none of them empty"),
        ("choice", ["a", 3], "strings"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_reason(
    kind: ConstraintKind, source: object, said: str
) -> None:
    error = refusal(kind, source)
    assert error.field == "schema"
    assert said in str(error)
    assert "\n" not in str(error)


def test_a_grammar_is_bounded_in_bytes_nesting_and_width() -> None:
    nested: dict[str, Any] = {}
    for _ in range(70):
        nested = {"items": nested}
    assert "nested too deeply: at most 64" in str(refusal("json_schema", nested))
    wide: Schema = {"properties": {f"p{n}": {} for n in range(513)}}
    assert "has 513: must be at most 512" in str(refusal("json_schema", wide))
    many: Schema = {"anyOf": [{"items": {}}] * 1024}
    assert "too many schemas: at most 2048" in str(refusal("json_schema", many))
    long = refusal("choice", ["x" * 100], GrammarLimits(source_bytes=50))
    assert (long.status, "must be at most 50" in str(long)) == (413, True)
    with pytest.raises(ConfigError, match="kept = 0"):
        GrammarLimits(kept=0)


def test_a_model_that_cannot_end_its_answers_takes_no_grammar() -> None:
    grammars = Grammars(toy_text(eos=False), vocab=VOCAB)
    with pytest.raises(RequestError, match="needs a model that can end its answers"):
        asyncio.run(grammars.prepare(constrained("json_object", "")))


def test_a_tokenizer_of_an_unknown_kind_is_named_as_what_is_wrong() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    text = TextModel(words, eos_ids=frozenset({1}), context_tokens=8)
    grammars = Grammars(text, vocab=3)
    for _ in range(2):
        with pytest.raises(RequestError, match="schema: this model's tokenizer takes no grammar"):
            asyncio.run(grammars.prepare(constrained("json_object", "")))


def test_the_last_grammars_are_kept_and_the_oldest_goes() -> None:
    async def scenario() -> None:
        grammars = Grammars(toy_text(), vocab=VOCAB, limits=GrammarLimits(kept=2))
        first, second, third = (constrained("choice", [word]) for word in "abc")
        for one in (first, second, first, third):
            await grammars.prepare(one)
        grammars.guide(first)
        grammars.guide(third)
        with pytest.raises(AssertionError, match="prepare the constraint first"):
            grammars.guide(second)

    asyncio.run(scenario())


def test_grammars_that_wait_to_be_compiled_are_bounded_and_one_is_compiled_once() -> None:
    async def scenario() -> None:
        grammars = Grammars(toy_text(), vocab=VOCAB, limits=GrammarLimits(waiting=2))
        await grammars.prepare(constrained("json_object", ""))
        same = [asyncio.create_task(grammars.prepare(constrained("choice", ["a"])))] * 2
        other = asyncio.create_task(grammars.prepare(constrained("choice", ["b"])))
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="2 grammars are being compiled"):
            await grammars.prepare(constrained("choice", ["c"]))
        await asyncio.gather(*same, other)
        await grammars.prepare(constrained("choice", ["c"]))

    asyncio.run(scenario())


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_is_not() -> None:
    async def scenario() -> None:
        grammars = Grammars(toy_text(), vocab=VOCAB, limits=GrammarLimits(compile_s=0.02))
        slow = {"properties": {f"p{n}": {"type": "string"} for n in range(500)}}
        with pytest.raises(RequestError, match=r"did not compile within 0\.02 s"):
            await grammars.prepare(constrained("json_schema", slow))
        while True:  # the thread is still busy with it
            try:
                await grammars.prepare(constrained("choice", ["a"]))
                break
            except CapacityError:  # whoever waits behind it is not to blame
                await asyncio.sleep(0.02)

    asyncio.run(scenario())


@pytest.mark.parametrize("late", [False, True])
def test_closing_ends_every_wait_for_a_grammar_with_an_error(late: bool) -> None:
    async def scenario() -> None:
        grammars = Grammars(toy_text(), vocab=VOCAB)
        # Nearly as large as a schema may be: whichever is compiled first, the other still waits.
        inner = {"properties": {"a": {"type": "string"}, "b": {"type": "number"}}}
        slow = [{"properties": {f"{x}{n}": inner for n in range(500)}} for x in "pq"]
        early = asyncio.create_task(grammars.prepare(constrained("choice", ["early"])))
        await asyncio.sleep(0)
        if late:
            await early  # and with it the tokenizer
        both = [
            asyncio.create_task(grammars.prepare(constrained("json_schema", schema)))
            for schema in slow
        ]
        await asyncio.sleep(0)
        grammars.close()
        ends = await asyncio.gather(*both, return_exceptions=True)
        assert all(end is None or isinstance(end, UnavailableError) for end in ends)
        assert any("the engine has stopped" in str(end) for end in ends)
        with pytest.raises(UnavailableError, match="the engine has stopped"):
            await grammars.prepare(constrained("choice", ["b"]))
        await asyncio.gather(early, return_exceptions=True)

    asyncio.run(scenario())


def test_an_abandoned_wait_leaves_the_grammar_to_whoever_comes_next() -> None:
    async def scenario() -> None:
        grammars = Grammars(toy_text(), vocab=VOCAB)
        wait = asyncio.create_task(grammars.prepare(constrained("json_object", "")))
        await asyncio.sleep(0)
        wait.cancel()
        await asyncio.gather(wait, return_exceptions=True)
        await grammars.prepare(constrained("json_object", ""))
        grammars.guide(constrained("json_object", ""))

    asyncio.run(scenario())


@settings(deadline=None)
@given(schemas())
def test_every_schema_of_the_random_ones_compiles(schema: Schema) -> None:
    asyncio.run(GRAMMARS.prepare(constrained("json_schema", schema)))


def test_the_validator_of_these_tests_tells_valid_from_invalid() -> None:
    schema = {"type": "array", "items": {"enum": [1, "x"]}, "minItems": 1, "maxItems": 2}
    assert is_valid(schema, [1, "x"])
    assert not any(is_valid(schema, wrong) for wrong in ([], [True], [2], ["x"] * 3, "x"))
