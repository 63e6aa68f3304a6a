"""`POST /route/explain`: what would be done with a call, without doing it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import jsonschema_rs
import pytest
from echobackend import EchoBackend
from explainingbackend import ExplainingEcho

from tidegate.api.admission import CallSize, Knock, Tally
from tidegate.api.backend import Explaining
from tidegate.api.explain import PATH
from tidegate.api.http import HttpSettings, create_app
from tidegate.api.keys import KeyRing, hash_key
from tidegate.api.openapi import document
from tidegate.errors import RequestError, UnavailableError

HELLO: dict[str, object] = {"messages": [{"role": "user", "content": "hello"}]}


def asked(
    backend: EchoBackend,
    body: object,
    *,
    settings: HttpSettings | None = None,
    key: str | None = None,
    method: str = "POST",
) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(backend, settings=settings))
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, PATH, json=body, headers=headers)

    return asyncio.run(ask())


def conforms(value: object) -> None:
    told: Any = document()
    said = told["paths"][PATH]["post"]["responses"]["200"]["content"]["application/json"]
    schema = {**said["schema"], "components": told["components"]}
    jsonschema_rs.validator_for(schema).validate(value)


@pytest.mark.parametrize(
    ("body", "route"),
    [
        (HELLO, "edge"),
        ({"messages": [{"role": "user", "content": "x" * 99}]}, "cloud"),
        ({"prompt": "hello"}, "edge"),
        ({"prompt": [1, 2, 3]}, "edge"),
        ({**HELLO, "stream": True, "n": 2, "max_tokens": 5}, "edge"),
    ],
)
def test_it_tells_where_a_call_would_run_and_the_numbers_and_runs_nothing(
    body: dict[str, object], route: str
) -> None:
    backend = ExplainingEcho()
    response = asked(backend, body)
    assert response.status_code == 200, response.text
    told = response.json()
    assert told["route"] == route
    assert told["pace"]["mode"] == "15W"
    assert told["pace"]["terms"]["cloud_j"] == 2.5
    conforms(told)
    assert backend.begun == 0
    assert backend.calls == []


def test_the_whole_call_is_explained_with_its_wishes() -> None:
    backend = ExplainingEcho()
    wishes = {"privacy": "local", "deadline_ms": 700, "priority": "background"}
    told = asked(backend, {**HELLO, "max_tokens": 9, "tidegate": wishes}).json()
    (call,) = backend.explained
    assert call.options.deadline_ms == 700
    assert call.sampling.max_tokens == 9
    assert told["filters"]["cloud"] == "private (local): never leaves the device"


def test_a_way_that_is_closed_is_null_and_not_infinity() -> None:
    told = asked(ExplainingEcho(), {**HELLO, "tidegate": {"privacy": "local"}}).json()
    assert told["pace"]["terms"]["cloud_j"] is None
    assert told["clock"]["cloud_s"] is None
    conforms(told)


def test_without_a_scheduler_by_energy_the_clock_is_explained() -> None:
    told = asked(ExplainingEcho(has_pace=False), HELLO).json()
    assert told["pace"] is None
    assert told["clock"]["edge_s"] == 0.5
    conforms(told)


def test_where_there_is_nothing_to_explain_there_is_no_such_path() -> None:
    assert not isinstance(EchoBackend(), Explaining)
    response = asked(EchoBackend(), HELLO)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"messages": None, "prompt": None}, "messages"),
        ({**HELLO, "prompt": "both"}, "prompt"),
        ({**HELLO, "temperature": 9}, "temperature"),
        ({**HELLO, "tidegate": {"privacy": "none"}}, "tidegate.privacy"),
        ({"prompt": ""}, "prompt"),
        ([], "body"),
        ("hello", "body"),
    ],
)
def test_a_body_that_is_no_call_is_refused_as_the_call_would_be(body: object, field: str) -> None:
    backend = ExplainingEcho()
    response = asked(backend, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert backend.explained == []


def test_an_unserved_model_is_a_404_that_lists_what_is_served() -> None:
    response = asked(ExplainingEcho(), {**HELLO, "model": "other"})
    assert response.status_code == 404
    assert "must be echo-1" in response.json()["error"]["message"]


def test_only_a_post_explains() -> None:
    assert asked(ExplainingEcho(), HELLO, method="PUT").status_code == 405


def test_what_the_backend_refuses_has_its_status() -> None:
    long = RequestError("messages", "too long", status=413)
    assert asked(ExplainingEcho(failing=long), HELLO).status_code == 413
    gone = asked(ExplainingEcho(failing=UnavailableError("not now")), HELLO)
    assert gone.status_code == 503
    assert "Retry-After" in gone.headers


def test_it_asks_for_a_key_where_calls_do() -> None:
    settings = HttpSettings(authorise=KeyRing((hash_key("tg-good"),)))
    backend = ExplainingEcho()
    assert asked(backend, HELLO, settings=settings).status_code == 401
    assert asked(backend, HELLO, settings=settings, key="tg-good").status_code == 200
    assert len(backend.explained) == 1


class CountingVisit:
    """A caller with one model whose key pays for requests."""

    refusal = None

    def __init__(self, model: str) -> None:
        self.headers: dict[str, str] = {}
        self.tally, self._model = Tally(), model
        self.paid: list[tuple[int, str]] = []

    def may_use(self, model: str) -> bool:
        return model == self._model

    async def expect(self, least: CallSize) -> None:
        raise AssertionError("nothing is run")

    async def admit(self, size: CallSize) -> None:
        raise AssertionError("nothing is run")

    async def admit_tokens(self, tokens: int, model: str) -> None:
        if not self.may_use(model):
            raise RequestError("model", "not for this key", status=403)
        self.paid.append((tokens, model))

    def leave(self, status: int, request_id: str) -> None:
        return


class Counting:
    """An admission with one visit."""

    def __init__(self, model: str) -> None:
        self.visit = CountingVisit(model)

    def knock(self, knock: Knock) -> CountingVisit:
        return self.visit


def test_a_key_pays_for_a_request_without_tokens_and_its_models_are_minded() -> None:
    mine = Counting("echo-1")
    assert asked(ExplainingEcho(), HELLO, settings=HttpSettings(admission=mine)).status_code == 200
    assert mine.visit.paid == [(0, "echo-1")]
    assert mine.visit.tally.outcome == "ok"
    others = Counting("another")
    backend = ExplainingEcho()
    refused = asked(backend, HELLO, settings=HttpSettings(admission=others))
    assert refused.status_code == 403
    assert backend.explained == []
