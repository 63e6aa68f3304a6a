"""One call's trouble is its own: those beside it get what they get alone, over a real socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from httpengine import CHAT, body, served
from toyengine import toy_engine
from toyexecutor import Behaviour, ToyExecutor
from toytext import toy_text

from tidegate.engine.engine import Engine
from tidegate.engine.executor import ExecutorStep, PagedGeometry

ROOMY = PagedGeometry(block_tokens=4, blocks=400, bytes_per_token=8)
(POISON,) = toy_text().encode_prompt("~")
GOOD = ("hello", "the tide", "a gate", "the fox")
JSON = {"Content-Type": "application/json"}
DEEP = {"type": "array"}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}  # type: ignore[dict-item]


def poisonable() -> ToyExecutor:
    """A model that breaks whenever one token is in its step."""

    def fails(step: ExecutorStep) -> bool:
        return any(POISON in row.tokens for row in step.rows)

    return ToyExecutor(ROOMY, context_tokens=256, behaviour=Behaviour(fails=fails, step_s=0.002))


def never_poison() -> dict[str, Any]:
    """The model's own words must not be the poison."""
    return {"logit_bias": {str(POISON): -100}, "max_tokens": 40, "ignore_eos": True}


def schema(source: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": source}}


BAD: tuple[tuple[int, bytes], ...] = (
    (500, json.dumps(body("~ breaks it", max_tokens=40)).encode()),
    (500, json.dumps(body("~ breaks it", max_tokens=40, n=3)).encode()),
    (400, b"{"),
    (400, b"\xff\xfe\x00"),
    (400, b"[" * 50_000),
    (400, json.dumps(body(response_format=schema({"type": "nothing"}))).encode()),
    (400, json.dumps(body(response_format=schema(DEEP))).encode()),
    (400, json.dumps(body(guided_regex="(a")).encode()),
    (400, json.dumps(body(temperature="hot")).encode()),
    (404, json.dumps(body(model="no such")).encode()),
    (413, json.dumps(body("long " * 4000)).encode()),
    (413, b" " * (3 << 20)),
)


async def said(client: httpx.AsyncClient, words: str, *, stream: bool) -> str:
    """The text of a good call."""
    answer = await client.post(CHAT, json=body(words, stream=stream, **never_poison()))
    assert answer.status_code == 200, answer.text
    if not stream:
        return str(answer.json()["choices"][0]["message"]["content"])
    events = [one.removeprefix("data: ") for one in answer.text.split("\n\n") if one]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(one)["choices"][0]["delta"] for one in events]
    return "".join(chunk.get("content", "") for chunk in chunks)


def test_good_calls_beside_broken_ones_say_what_they_say_alone() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        alone = [await said(client, words, stream=False) for words in GOOD]

        async def bad(status: int, content: bytes) -> None:
            answer = await client.post(CHAT, content=content, headers=JSON)
            assert answer.status_code == status, answer.text
            told = answer.json()["error"]
            assert told["code"]
            assert "Traceback" not in told["message"]

        for stream in (False, True):
            beside = asyncio.gather(*(bad(*one) for one in BAD))
            good = await asyncio.gather(*(said(client, words, stream=stream) for words in GOOD))
            await beside
            assert good == alone
        now = engine.snapshot()
        assert now.healthy
        assert now.failed > 0, "the broken ones met the model"
        assert (now.running, now.waiting, now.kv_usage) == (0, 0, 0)

    async def run() -> None:
        engine = toy_engine(poisonable())
        async with served(engine) as client:
            await test(client, engine)

    asyncio.run(run())
