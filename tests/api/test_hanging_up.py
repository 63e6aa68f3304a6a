"""Who hangs up has its KV back within a step: the one that runs ends, and no other begins.

Over a real socket, on the toy model, with a step held in flight while the client leaves.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from httpengine import CHAT, body, served
from toyengine import toy_engine
from toyexecutor import Behaviour, ToyExecutor

from tidegate.engine.engine import Engine
from tidegate.engine.executor import PagedGeometry, SlotGeometry

ROOMY = PagedGeometry(block_tokens=4, blocks=800, bytes_per_token=8)
SLOTS = SlotGeometry(slots=8, slot_tokens=900, bytes_per_token=8)
WRITE = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "minLength": 200}},
            "required": ["text"],
        },
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "w", "schema": {"type": "string", "minLength": 200}},
}
CALLS: dict[str, dict[str, Any]] = {
    "whole": {},
    "streamed": {"stream": True},
    "three at once": {"n": 3},
    "three streamed": {"n": 3, "stream": True},
    "a tool": {"tools": [WRITE], "tool_choice": "required"},
    "a tool streamed": {"tools": [WRITE], "tool_choice": "required", "stream": True},
    "a schema": {"response_format": SCHEMA},
    "likelihoods": {"logprobs": True, "top_logprobs": 3},
}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def request(fields: dict[str, Any]) -> bytes:
    free = not fields.keys() & {"tools", "response_format"}  # what has a form has an end
    asked: dict[str, Any] = {"ignore_eos": free, **fields}
    content = json.dumps(body(**asked)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def with_gate(
    test: Callable[[httpx.URL, Engine, ToyExecutor, threading.Event], Awaitable[None]],
    shape: PagedGeometry | SlotGeometry = ROOMY,
) -> None:
    """Run one test against a served engine whose steps wait while the gate is closed."""

    async def run() -> None:
        gate = threading.Event()
        gate.set()
        executor = ToyExecutor(shape, context_tokens=900, behaviour=Behaviour(gate=gate))
        engine = toy_engine(executor)
        try:
            async with served(engine) as client:
                await test(client.base_url, engine, executor, gate)
        finally:
            gate.set()

    asyncio.run(run())


async def hold(engine: Engine, executor: ToyExecutor, gate: threading.Event, running: int) -> None:
    """Wait until so many run, and then for a step to be in flight."""
    tokens = engine.snapshot().generated_tokens + 12
    await until(lambda: engine.snapshot().running == running)
    await until(lambda: engine.snapshot().generated_tokens >= tokens)
    gate.clear()
    await until(lambda: executor.busy)


async def let_go(engine: Engine, executor: ToyExecutor, gate: threading.Event) -> None:
    """After a client left while a step was in flight: that one ends, and everything is free."""
    await until(lambda: engine.snapshot().running == 0)
    steps = executor.record.steps
    gate.set()
    await until(lambda: engine.snapshot().kv_usage == 0)
    await asyncio.sleep(0.02)
    assert executor.record.steps == steps
    engine._batcher.kv.check_integrity()


@pytest.mark.parametrize("shape", [ROOMY, SLOTS], ids=lambda one: one.kind)
@pytest.mark.parametrize("call", CALLS)
def test_no_step_runs_for_a_client_that_left(
    call: str, shape: PagedGeometry | SlotGeometry
) -> None:
    async def test(
        url: httpx.URL, engine: Engine, executor: ToyExecutor, gate: threading.Event
    ) -> None:
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(request(CALLS[call]))
        await hold(engine, executor, gate, running=CALLS[call].get("n", 1))
        writer.close()
        await let_go(engine, executor, gate)
        assert engine.snapshot().cancelled == CALLS[call].get("n", 1)

    with_gate(test, shape)


def test_on_a_kept_connection_it_is_the_same() -> None:
    async def test(
        url: httpx.URL, engine: Engine, executor: ToyExecutor, gate: threading.Event
    ) -> None:
        reader, writer = await asyncio.open_connection(url.host, url.port)
        for fields in ({"max_tokens": 3}, {"max_tokens": 3, "stream": True}):
            writer.write(request(fields))
            got = b""
            while not (got.endswith((b"0\r\n\r\n", b"}"))):
                got += await reader.read(65536)
            assert got.startswith(b"HTTP/1.1 200")
        writer.write(request({}))
        await hold(engine, executor, gate, running=1)
        writer.close()
        await let_go(engine, executor, gate)
        assert (engine.snapshot().finished, engine.snapshot().cancelled) == (2, 1)

    with_gate(test)


def test_who_left_while_waiting_never_runs_and_those_beside_it_go_on() -> None:
    async def test(
        url: httpx.URL, engine: Engine, executor: ToyExecutor, gate: threading.Event
    ) -> None:
        stays = [await asyncio.open_connection(url.host, url.port) for _ in range(8)]
        for _, writer in stays:
            writer.write(request({"max_tokens": 60}))
        await hold(engine, executor, gate, running=8)
        leaves = [await asyncio.open_connection(url.host, url.port) for _ in range(4)]
        for _, writer in leaves:
            writer.write(request({"max_tokens": 60}))
        await until(lambda: engine.snapshot().waiting == 4)
        for _, writer in leaves:
            writer.close()
        await until(lambda: engine.snapshot().waiting == 0)
        gate.set()
        for reader, writer in stays:
            got = b""
            while not got.endswith(b"}"):
                got += await reader.read(65536)
            assert json.loads(got.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 60
            writer.close()
        now = engine.snapshot()
        assert (now.finished, now.cancelled, now.failed) == (8, 4, 0)
        assert executor.record.most_rows == 8

    with_gate(test)


def test_who_left_before_its_call_was_whole_costs_nothing() -> None:
    async def test(
        url: httpx.URL, engine: Engine, executor: ToyExecutor, gate: threading.Event
    ) -> None:
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(request({})[:-20])
        await writer.drain()
        writer.close()
        async with httpx.AsyncClient(base_url=url) as client:
            whole = await client.post(CHAT, json=body(max_tokens=3))
        assert whole.status_code == 200
        assert engine.snapshot().finished == 1
        assert engine.snapshot().cancelled == 0

    with_gate(test)
