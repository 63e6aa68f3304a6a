"""Real answers, whole and streamed, are what the document says: each object, each event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema_rs
import pytest
from echobackend import EchoBackend
from httpengine import CHAT, body, with_engine
from toyengine import toy_engine
from toyexecutor import ToyExecutor

from tidegate.api.backend import ModelCard
from tidegate.api.http import create_app
from tidegate.api.openapi import document
from tidegate.engine.engine import Engine
from tidegate.engine.events import Failed
from tidegate.engine.executor import PagedGeometry

DOCUMENT: Any = document()
ROOMY = PagedGeometry(block_tokens=4, blocks=400, bytes_per_token=8)
LAMP = {
    "type": "function",
    "function": {
        "name": "lamp",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
        },
    },
}
LONG = {
    "messages": [
        {"role": "user", "content": "x" * 700},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "z"},
    ],
    "temperature": 0,
}
CALLS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, body(max_tokens=4)),
    (CHAT, body(max_tokens=3, n=2, logprobs=True, top_logprobs=2, temperature=1, seed=1)),
    (CHAT, body(tools=[LAMP], tool_choice="required", max_tokens=60)),
    (CHAT, {**LONG, "max_tokens": 3, "tidegate": {"context_policy": "truncate_oldest"}}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 4, "logprobs": 2, "seed": 1}),
    ("/v1/completions", {"prompt": [5, 6], "max_tokens": 4, "n": 2, "seed": 1}),
]


def roomy() -> Engine:
    """A toy whose context has room for tools."""
    return toy_engine(ToyExecutor(ROOMY, context_tokens=700))


def conforms(reference: dict[str, str]) -> Callable[[object], None]:
    """Raises, with what is wrong, for anything that is not what the reference says."""
    schema = {**reference, "components": DOCUMENT["components"]}
    return jsonschema_rs.validator_for(schema).validate


def content_of(path: str) -> Any:
    return DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]


@pytest.mark.parametrize(("path", "asked"), CALLS)
def test_an_answer_is_what_the_document_says(path: str, asked: dict[str, Any]) -> None:
    async def test(client: httpx.AsyncClient, _: Engine) -> None:
        response = await client.post(path, json=asked)
        assert response.status_code == 200, response.text
        conforms(content_of(path)["application/json"]["schema"])(response.json())

    with_engine(test, roomy())


@pytest.mark.parametrize(("path", "asked"), CALLS)
def test_every_event_of_a_stream_is_what_the_document_says(
    path: str, asked: dict[str, Any]
) -> None:
    async def test(client: httpx.AsyncClient, _: Engine) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = await client.post(path, json=asked | options)
        datas = [one.removeprefix("data: ") for one in response.text.split("\n\n") if one]
        assert datas.pop() == "[DONE]"
        check = conforms(content_of(path)["text/event-stream"]["x-event-schema"])
        for data in datas:
            check(json.loads(data))
        assert len(datas) > 4

    with_engine(test, roomy())


def test_an_error_within_a_stream_is_the_error_of_the_document() -> None:
    failed = Failed(code="unavailable", message="gone", retryable=True)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(EchoBackend(break_after=1, breaking=failed)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(CHAT, json=body("one two", stream=True))

    *_, last = [one for one in asyncio.run(ask()).text.split("\n\n") if one]
    conforms({"$ref": "#/components/schemas/Error"})(json.loads(last.removeprefix("data: ")))


class WithAdapter(EchoBackend):
    """Lists a model that comes and goes, and an adapter of it."""

    def models(self) -> tuple[ModelCard, ...]:
        card = ModelCard(id="base", created_s=1, context_tokens=8, state="ready")
        return (card, ModelCard(id="lora", created_s=1, context_tokens=8, parent="base"))


def test_models_and_their_adapters_are_what_the_document_says() -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(WithAdapter()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/v1/models")

    conforms({"$ref": "#/components/schemas/Models"})(asyncio.run(ask()).json())
