"""What a key that may use only some models is shown, and what its tokenizing counts as."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from echobackend import EchoBackend
from keyedapp import CHAT, HELLO, Clock, Keyed, keyed, keyed_access
from toypool import ToyModels, started, toy_pool

from tidegate.api.backend import ModelCard
from tidegate.api.http import create_app
from tidegate.api.settings import HttpSettings
from tidegate.cloud.key_rules import KeyRules, Rate
from tidegate.cloud.usage import exported

NAMES = ("echo-1", "echo-2", "secret-3")


class Several(EchoBackend):
    """Lists three models."""

    def models(self) -> tuple[ModelCard, ...]:
        return tuple(ModelCard(id=name, created_s=0, context_tokens=64) for name in NAMES)


def run(folder: Path, test: Callable[[Keyed], Awaitable[None]]) -> None:
    async def main() -> None:
        async with keyed(folder, clock=Clock(), backend=Several()) as world:
            await test(world)

    asyncio.run(main())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def listed(world: Keyed, key: str) -> list[str]:
    answer = await world.client.get("/v1/models", headers=bearer(key))
    return [card["id"] for card in answer.json()["data"]]


def test_a_key_is_shown_the_models_that_it_may_use(tmp_path: Path) -> None:
    async def test(world: Keyed) -> None:
        _, some = world.add(models=("echo-2", "echo-1"))
        _, every = world.add("every")
        _, none = world.add("none", models=("elsewhere",))
        assert await listed(world, some) == ["echo-1", "echo-2"]
        assert await listed(world, every) == [*NAMES]
        assert await listed(world, none) == []
        for name, status in {"echo-1": 200, "secret-3": 404, "no-such": 404}.items():
            one = await world.client.get(f"/v1/models/{name}", headers=bearer(some))
            assert one.status_code == status

    run(tmp_path, test)


def test_a_model_that_is_not_served_is_answered_with_those_that_the_key_may_use(
    tmp_path: Path,
) -> None:
    async def test(world: Keyed) -> None:
        _, key = world.add(models=("echo-1", "echo-2"))
        refused = await world.chat(key, model="moon")
        assert refused.status_code == 404
        assert refused.json()["error"]["message"].endswith("must be echo-1, echo-2")

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "hello"}), ("/v1/detokenize", {"tokens": [5]})]
)
def test_tokenizing_is_a_request_without_tokens_of_the_keys_limits(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    async def test(world: Keyed) -> None:
        rates = tuple(Rate(unit=unit, amount=1, window_s=60) for unit in ("requests", "tokens"))
        _, key = world.add(rates=rates, models=("echo-2",))
        answer = await world.client.post(path, json=body, headers=bearer(key))
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-tokens"] == "1"
        refused = await world.client.post(path, json=body, headers=bearer(key))
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            429,
            "rate_limit_exceeded",
        )
        world.access.usage.flush()
        (row,) = [exported(one) for one in world.access.usage.rows(0, 1e12)]
        assert (row["endpoint"], row["model"], row["prompt_tokens"]) == (path, "echo-2", 0)

    run(tmp_path, test)


def test_tokenizing_needs_a_key_that_may_use_the_model_and_a_scope_of_texts(
    tmp_path: Path,
) -> None:
    async def test(world: Keyed) -> None:
        _, scrapes = world.add("scrapes", scopes=("metrics",))
        _, chats = world.add("chats", scopes=("chat",), models=("echo-1",))
        _, completes = world.add("completes", scopes=("completions",))
        for key, model, status in (
            (scrapes, "echo-1", 403),
            (chats, "echo-1", 200),
            (chats, "secret-3", 403),
            (completes, "secret-3", 200),
        ):
            body = {"prompt": "hello", "model": model}
            answer = await world.client.post("/tokenize", json=body, headers=bearer(key))
            assert answer.status_code == status
        refused = await world.client.post("/tokenize", json=body, headers=bearer(scrapes))
        assert "lacks the scope 'chat' or 'completions'" in refused.json()["error"]["message"]
        assert (await world.client.post("/tokenize", json=body)).status_code == 401

    run(tmp_path, test)


def test_a_model_that_a_key_may_not_use_is_not_loaded_to_see_how_large_its_call_is(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        access, maker = keyed_access(tmp_path), ToyModels()
        async with started(toy_pool(("one", "two"), maker, models_mib=10)) as backend:
            app = create_app(backend, settings=HttpSettings(admission=access))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                rules = KeyRules(models=("one",))
                _, key = access.keys.add("team", rules, now_s=access.clock())
                body = {**HELLO, "model": "two", "max_tokens": 2}
                refused = await client.post(CHAT, json=body, headers=bearer(key))
        await access.close()
        assert refused.status_code == 403
        assert "this key may use one" in refused.json()["error"]["message"]
        assert maker.loads == ["one"]
        assert maker.closed == ["one-0"], "at the end, and not for two"

    asyncio.run(main())
