"""What keys with limits are answered is what the OpenAPI document says: bodies, heads, statuses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
from echobackend import EchoBackend
from keyedapp import CHAT, HELLO, Clock, Keyed, keyed

from tidegate.api.openapi import document
from tidegate.cloud.key_rules import Quota, Rate
from tidegate.errors import UnavailableError

DOCUMENT: Any = document()
GIVEN = {"content-length", "content-type", "connection"}
"""Heads of HTTP's own, which the document need not have."""


def run(folder: Path, test: Callable[[Keyed], Awaitable[None]], **how: Any) -> None:
    async def main() -> None:
        async with keyed(folder, clock=Clock(), **how) as world:
            await test(world)

    asyncio.run(main())


def resolved(told: Any) -> Any:
    while "$ref" in told:
        found = DOCUMENT
        for step in told["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        told = found
    return told


def check(response: httpx.Response, path: str = CHAT, method: str = "post") -> int:
    """Hold an answer against the document; its status."""
    told = resolved(DOCUMENT["paths"][path][method]["responses"][str(response.status_code)])
    schema = told["content"]["application/json"]["schema"]
    jsonschema_rs.validate({**schema, "components": DOCUMENT["components"]}, response.json())
    known = {name.lower() for name in told["headers"]}
    assert {*response.headers} - GIVEN <= known
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    return response.status_code


def test_an_answer_with_limits_has_the_heads_of_the_document(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        rates = (
            Rate(unit="requests", amount=2, window_s=60, strategy="sliding"),
            Rate(unit="tokens", amount=5000, window_s=60),
        )
        _, key = world.add(rates=rates)
        assert [check(await world.chat(key)) for _ in range(3)] == [200, 200, 429]

    run(tmp_path, test)


def test_every_refusal_of_a_key_is_one_of_the_document(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, none = world.add("none", scopes=("metrics",))
        _, other = world.add("other", models=("elsewhere",))
        quota = Quota(unit="requests", period="day", amount=1)
        _, spent = world.add("spent", quotas=(quota,))
        _, small = world.add("small", quotas=(Quota(unit="tokens", period="day", amount=9),))
        assert check(await world.chat(spent)) == 200
        told = [check(await world.chat(key)) for key in (None, none, other, spent, small)]
        assert told == [401, 403, 403, 429, 413]
        long = {"Authorization": f"Bearer {spent}", "X-Long": "x" * 70_000}
        assert check(await world.client.post(CHAT, json=HELLO, headers=long)) == 431
        listed = await world.client.get("/v1/models", headers={"Authorization": f"Bearer {other}"})
        assert check(listed, "/v1/models", "get") == 200

    run(tmp_path, test)


def test_a_service_that_cannot_now_says_when_as_the_document_has_it(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add()
        assert check(await world.chat(key)) == 503
        assert check(await world.client.get("/health"), "/health", "get") == 503
        assert check(await world.client.get("/ready"), "/ready", "get") == 503

    gone = EchoBackend(refuse=UnavailableError("gone"), healthy=False)
    run(tmp_path, test, backend=gone)
