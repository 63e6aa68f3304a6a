"""Calls that only read: what a key pays for one that ended early, over HTTP without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from handembedder import LetterEmbedder
from keyedapp import Clock, Keyed, keyed, text_of

from tidegate.api.embeddings import Embedded
from tidegate.api.encoders import Encoders
from tidegate.api.http import create_app
from tidegate.api.settings import HttpSettings
from tidegate.api.texts import Counted, Text, uncounted
from tidegate.cloud.key_rules import Quota, Rate
from tidegate.cloud.usage import exported
from tidegate.engine.text import TextModel
from tidegate.errors import CapacityError, DeadlineError, ExecutionError, UnavailableError

EMBEDDINGS = "/v1/embeddings"
TWO_REQUESTS = Rate(unit="requests", amount=2, window_s=3600)
TOKENS = Quota(unit="tokens", period="day", amount=100)


class EndingEmbedder(LetterEmbedder):
    """Counts what it is given, and then ends as it was told; without an error it never does."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error
        self.begun = asyncio.Event()

    async def embed(
        self,
        inputs: tuple[Text, ...],
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Embedded:
        found = await super().embed(inputs, counted=counted)
        self.begun.set()
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()
        return found


def run(folder: Path, test: Callable[[Keyed], Awaitable[None]]) -> None:
    async def main() -> None:
        async with keyed(folder, clock=Clock()) as world:
            await test(world)

    asyncio.run(main())


def used(world: Keyed) -> list[tuple[Any, Any]]:
    """Outcome and prompt tokens of each row."""
    world.access.usage.flush()
    rows = [exported(row) for row in world.access.usage.rows(0, 1e12)]
    return [(row["outcome"], row["prompt_tokens"]) for row in rows]


async def leave(app: Any, key: str, path: str, begun: asyncio.Event, **body: Any) -> None:
    """Ask, and hang up once the work has begun."""
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": json.dumps(body).encode()}
        await begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there")

    heads = [
        (b"authorization", f"Bearer {key}".encode()),
        (b"content-type", b"application/json"),
    ]
    scope = {"type": "http", "method": "POST", "path": path, "headers": heads}
    await app({**scope, "query_string": b"", "client": ("10.0.0.1", 1)}, receive, send)


def test_who_leaves_an_encoder_pays_for_the_tokens_that_it_read(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(rates=(TWO_REQUESTS,), quotas=(TOKENS,))
        embedder = EndingEmbedder(None)
        settings = HttpSettings(admission=world.access)
        app = create_app(world.backend, settings=settings, encoders=Encoders(embedders=(embedder,)))
        for _ in range(2):
            await leave(app, key, EMBEDDINGS, embedder.begun, input="abcde")
        assert used(world) == [("aborted", 5), ("aborted", 5)]
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            heads = {"Authorization": f"Bearer {key}"}
            third = await client.post(EMBEDDINGS, json={"input": "abcde"}, headers=heads)
        assert third.status_code == 429
        assert len(embedder.calls) == 2

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DeadlineError("late"), [504, 504, 429, 429]),
        (ExecutionError("broken"), [500, 500, 429, 429]),
        (CapacityError("full"), [429] * 4),
        (UnavailableError("closing"), [503] * 4),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_failed_is_a_request_and_what_was_refused_is_none(
    error: Exception, told: list[int], tmp_path: Path
) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(rates=(TWO_REQUESTS,), quotas=(TOKENS,))
        embedder = EndingEmbedder(error)
        settings = HttpSettings(admission=world.access)
        app = create_app(world.backend, settings=settings, encoders=Encoders(embedders=(embedder,)))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            heads = {"Authorization": f"Bearer {key}"}
            answers = [
                await client.post(EMBEDDINGS, json={"input": "abcde"}, headers=heads)
                for _ in range(4)
            ]
        assert [answer.status_code for answer in answers] == told
        refused = isinstance(error, CapacityError | UnavailableError)
        assert len(embedder.calls) == (4 if refused else 2)
        assert used(world) == ([] if refused else [("failed", 0)] * 2)

    run(tmp_path, test)


def test_who_leaves_while_it_is_tokenised_pays_for_the_request(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(rates=(TWO_REQUESTS,))
        begun = asyncio.Event()

        async def slow(model: str) -> TextModel:
            begun.set()
            await asyncio.Event().wait()
            return await text_of(model)

        app = create_app(world.backend, settings=HttpSettings(admission=world.access), texts=slow)
        await leave(app, key, "/tokenize", begun, prompt="one two")
        assert used(world) == [("aborted", 0)]

    run(tmp_path, test)
