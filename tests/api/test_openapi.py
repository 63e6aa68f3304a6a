"""The OpenAPI document: it is what the parser reads and what the routes are, and its file is it."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import jsonschema_rs
import pytest
from echobackend import EchoBackend
from explainingbackend import ExplainingEcho
from starlette.routing import Route

from tidegate.api.classify import read_classification
from tidegate.api.embeddings import read_embedding
from tidegate.api.field_table import Ignored, Neutral, Table
from tidegate.api.http import HttpSettings, create_app
from tidegate.api.openapi import document, document_text
from tidegate.api.openapi_operations import OPERATIONS
from tidegate.api.operating import RELOAD, RELOAD_MODE
from tidegate.api.schema import read_chat, read_completion
from tidegate.api.tokens import read_detokenize, read_tokenize
from tidegate.cloud.model_updates import MODES
from tidegate.cloud.reload import Reloader, reload_route
from tidegate.edge.link_answers import answer_routes
from tidegate.link.device import DeviceLink

FILE = Path(__file__).resolve().parents[2] / "docs/openapi.json"
DOCUMENT: Any = document()
SCHEMAS = DOCUMENT["components"]["schemas"]


def test_the_file_in_docs_is_the_document() -> None:
    assert FILE.read_text(encoding="utf-8") == document_text(), "run scripts/write-openapi"


def test_the_service_shows_it_without_a_key() -> None:
    async def ask() -> httpx.Response:
        app = create_app(EchoBackend(), settings=HttpSettings(authorise=lambda _: False))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/openapi.json")

    response = asyncio.run(ask())
    assert response.status_code == 200
    assert response.json() == json.loads(document_text())


def test_every_route_is_in_it_and_it_has_no_other() -> None:
    app = create_app(
        ExplainingEcho(),
        settings=HttpSettings(status=True),
        extra_routes=[
            *answer_routes(cast(DeviceLink, None)),
            reload_route(cast(Reloader, None), HttpSettings()),
        ],
    )
    served = {
        (method.lower(), route.path.replace(":path}", "}"))
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or ())
        if method != "HEAD"
    }
    told = {(method, path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert told == served


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for one in value.values():
            yield from references(one)
    elif isinstance(value, list):
        for one in value:
            yield from references(one)


def test_every_reference_leads_somewhere_and_every_schema_is_one_and_is_used() -> None:
    used = {*references(DOCUMENT)}
    for reference in used:
        found = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
    for name, schema in SCHEMAS.items():
        jsonschema_rs.meta.validate(schema)
        assert f"#/components/schemas/{name}" in used


def test_the_modes_of_a_reload_are_those_of_the_updater() -> None:
    assert RELOAD_MODE.allowed == MODES


def test_every_field_is_explained() -> None:
    for table in tables():
        for field in table.fields:
            assert field.told.endswith("."), f"{table.name}.{field.name}"


def tables() -> list[Table]:
    found: dict[str, Table] = {}

    def walk(table: Table) -> None:
        found[table.name] = table
        for field in table.fields:
            for inner in field.tables:
                walk(inner)

    for operation in OPERATIONS:
        if operation.body is not None:
            walk(operation.body)
    return [*found.values()]


READ: defaultdict[str, set[str]] = defaultdict(set)


class Watched(dict[str, Any]):
    """An object of a request that notes which of its fields somebody looks at."""

    def __init__(self, table: str, /, **fields: Any) -> None:
        super().__init__(fields)
        self._table = table

    def get(self, name: str, default: Any = None) -> Any:
        READ[self._table].add(name)
        return super().get(name, default)


CALLED = Watched("CalledFunction", name="lamp", arguments="{}")
MADE = Watched("ToolCall", id="1", type="function", function=CALLED)
TALK = [
    Watched("Message", role="user", content=[Watched("TextPart", type="text", text="hello")]),
    Watched("Message", role="assistant", content=None, tool_calls=[MADE]),
    Watched("Message", role="tool", tool_call_id="1", content="done"),
]
TOOLS = [Watched("Tool", type="function", function=Watched("Function", name="lamp"))]
NAMED = Watched("NamedToolChoice", type="function", function=Watched("FunctionName", name="lamp"))
SHAPE = Watched("JsonSchemaFormat", name="x", schema={})
BODIES: list[tuple[Callable[[object], object], Watched]] = [
    (
        read_chat,
        Watched(
            "ChatCall",
            messages=TALK,
            tools=TOOLS,
            tool_choice=NAMED,
            stream=True,
            stream_options=Watched("StreamOptions"),
            tidegate=Watched("TidegateOptions"),
        ),
    ),
    (
        read_chat,
        Watched(
            "ChatCall",
            messages=TALK,
            response_format=Watched("ResponseFormat", type="json_schema", json_schema=SHAPE),
        ),
    ),
    (
        read_completion,
        Watched(
            "CompletionCall", prompt="x", structured_outputs=Watched("StructuredOutputs", regex="a")
        ),
    ),
    (
        read_embedding,
        Watched("EmbeddingCall", input="x", tidegate=Watched("TidegateTextOptions")),
    ),
    (read_classification, Watched("ClassificationCall", input="x")),
    (read_tokenize, Watched("TokenizeCall", prompt="x")),
    (read_detokenize, Watched("DetokenizeCall", tokens=[])),
    (lambda data: RELOAD_MODE.read(RELOAD.open(data)), Watched("ReloadCall")),
]


def test_every_documented_field_is_looked_at_when_a_call_is_read() -> None:
    for read, body in BODIES:
        read(body)
    for table in tables():
        # The others are looked at when they are there: tests/api/test_fields_of_calls.py.
        looked_at = {one.name for one in table.fields if not isinstance(one, Ignored | Neutral)}
        assert READ[table.name] == looked_at, table.name


def test_a_reader_cannot_look_at_a_field_that_is_in_no_table() -> None:
    (table,) = [one for one in tables() if one.name == "StreamOptions"]
    with pytest.raises(AssertionError, match="temperature is in no table"):
        table.open({}).raw("temperature")
