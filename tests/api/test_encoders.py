"""Encoders beside a model: listed with it, and part of its health."""

from __future__ import annotations

import asyncio

import httpx
from echobackend import EchoBackend
from handembedder import LetterEmbedder, VowelClassifier

from tidegate.api.encoders import STALL_S, Encoders
from tidegate.api.http import create_app


def get(path: str, encoders: Encoders) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(EchoBackend(), encoders=encoders))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(send())


def test_embedders_and_classifiers_are_listed_behind_the_model() -> None:
    both = Encoders(embedders=(LetterEmbedder(),), classifiers=(VowelClassifier(),))
    listed = [card["id"] for card in get("/v1/models", both).json()["data"]]
    assert listed[-2:] == ["letters", "vowels"]
    assert get("/v1/models/vowels", both).json()["id"] == "vowels"


def test_a_run_that_never_ends_is_no_health() -> None:
    assert get("/health", Encoders(busy_s=lambda: STALL_S)).status_code == 200
    stuck = get("/health", Encoders(busy_s=lambda: STALL_S + 1))
    assert stuck.status_code == 503
    assert stuck.json() == {"healthy": False, "detail": "an encoder's run has taken 121 s so far"}
