"""Every field of every call, with values of every kind: what the document says, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jsonschema_rs
import pytest

from tidegate.api.classify import CLASSIFICATION, read_classification
from tidegate.api.embeddings import EMBEDDING, read_embedding
from tidegate.api.field_table import Field, Table
from tidegate.api.openapi import document
from tidegate.api.schema import CHAT, COMPLETION, read_chat, read_completion
from tidegate.api.tokens import DETOKENIZE, TOKENIZE, read_detokenize, read_tokenize
from tidegate.errors import RequestError

COMPONENTS: Any = document()["components"]
HELLO = [{"role": "user", "content": "hello"}]
CALLS: list[tuple[Table, Callable[[object], object], dict[str, object]]] = [
    (CHAT, read_chat, {"messages": HELLO, "stream": True}),
    (COMPLETION, read_completion, {"prompt": "hello", "stream": True}),
    (EMBEDDING, read_embedding, {"input": "hello"}),
    (CLASSIFICATION, read_classification, {"input": "hello"}),
    (TOKENIZE, read_tokenize, {"prompt": "hello"}),
    (TOKENIZE, read_tokenize, {"messages": HELLO}),
    (DETOKENIZE, read_detokenize, {"tokens": []}),
]
ODD: list[object] = [
    *(None, True, False, 0, 1, -1, 7, 2**70, 0.5, -3.5, 1e300, "", "x", "\ud800", "x" * 300),
    *([], [1], [-1], ["x"], [[]], [[1]], [None], [{}], {}, {"x": 1}, {"1": 1}, {"type": "text"}),
    *({"type": "json_object"}, {"role": "user"}, [{"role": "user", "content": "x"}]),
    *([{"type": "function", "function": {"name": "x"}}], {"regex": "a"}, {"route": "edge"}),
]
NEEDS_ANOTHER = {
    "top_logprobs": "must come with logprobs",
    "tool_choice": "must come with tools|must be one of the tools",
    "min_tokens": "must be between 0 and max_tokens",
    "continue_final_message": "must come with an assistant message",
    "add_generation_prompt": "not continue_final_message|must come with messages",
    "add_special_tokens": "in a chat",
    "best_of": "must be n",
    "stream": "must come with stream",
    "messages": "and so are messages",
    "prompt": "and so are messages",
    "structured_outputs": "must have one of",
    "tools": "must come with messages",
}
"""What a value that its schema admits may lack, by what the refusal says."""


@dataclass(frozen=True, kw_only=True)
class Case:
    table: Table
    read: Callable[[object], object]
    body: dict[str, object]
    field: Field


CASES = [
    pytest.param(
        Case(table=table, read=read, body=body, field=field),
        id=f"{table.name}-{number}-{field.name}",
    )
    for number, (table, read, body) in enumerate(CALLS)
    for field in table.fields
    # What comes beside the other one is refused as such, whatever it holds.
    if table is not TOKENIZE or {field.name, *body} != {"prompt", "messages"}
]


def values(field: Field) -> Iterator[object]:
    """Odd ones, and those at the edges of the field's own schema."""
    yield from ODD
    shape = field.shape()
    for edge in ("minimum", "maximum"):
        found = shape.get(edge)
        if isinstance(found, int | float):
            yield from (found, found - 1, found + 1)
    allowed = shape.get("enum", [])
    assert isinstance(allowed, list)
    yield from allowed
    most = shape.get("maxLength")
    if isinstance(most, int):
        yield from ("x" * most, "x" * (most + 1))


@cache
def admits(table: str, field: str) -> Callable[[object], bool]:
    """Tells whether the document says that a value may come."""
    schema = {"$ref": f"#/components/schemas/{table}/properties/{field}"}
    return jsonschema_rs.validator_for({**schema, "components": COMPONENTS}).is_valid


def refusal(case: Case, value: object) -> RequestError | None:
    try:
        case.read({**case.body, case.field.name: value})
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize("case", CASES)
def test_a_field_takes_what_the_document_says_and_refuses_the_rest_by_name(case: Case) -> None:
    name, admitted = case.field.name, admits(case.table.name, case.field.name)
    for value in values(case.field):
        lone = value == "\ud800"  # what no schema can say: half a surrogate pair
        error = refusal(case, value)
        if not lone and admitted(value):
            said = NEEDS_ANOTHER.get(name)
            assert error is None or (said and re.search(said, str(error))), (value, str(error))
            continue
        if error is None:
            assert lone
            continue
        assert re.match(rf"{name}(?![a-z])", error.field), (value, str(error))
        assert re.search("must|is absent|did you mean", str(error)), (value, str(error))
        assert error.status in (400, 413)


@pytest.mark.parametrize("case", CASES)
def test_a_misspelt_field_is_answered_with_the_one_that_was_meant(case: Case) -> None:
    name = case.field.name
    misspelt = f"{name}s"
    assert misspelt not in case.table.names
    with pytest.raises(RequestError, match=f"^{misspelt}: ") as refused:
        case.read({**case.body, misspelt: 1})
    assert refused.value.field == misspelt
