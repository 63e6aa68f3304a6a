"""Devices in the books of keys: usage and audit by handle, once for each request, without text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from keyedapp import Clock, keyed_access
from linkrequests import HANDLE, body, events, inbound, payloads
from toyengine import PAGED, serving
from toyexecutor import Behaviour, ToyExecutor
from toytext import toy_text

from tidegate.api.engine_backend import EngineBackend
from tidegate.api.metrics import Metrics
from tidegate.cloud.access import AccessControl
from tidegate.cloud.handler import LinkHandler
from tidegate.cloud.key_rules import Prices
from tidegate.cloud.price_table import PriceTable
from tidegate.cloud.usage import MOST_WAITING, exported
from tidegate.engine.engine import Engine
from tidegate.engine.events import Failed, Finished, TextDelta

SECRET = "wherewithal"
PRICES = PriceTable(models={"toy": Prices(prompt=1_000_000, completion=2_000_000)})

Test = Callable[[LinkHandler, AccessControl, Engine], Awaitable[None]]


def run(folder: Path, test: Test, *, behaviour: Behaviour | None = None, **access: Any) -> None:
    async def main() -> None:
        books = keyed_access(folder, clock=Clock(), prices=PRICES, **access)
        engine = Engine(
            ToyExecutor(PAGED, behaviour=behaviour), toy_text(eos=False), model_id="toy"
        )
        backend = EngineBackend(engine, route="cloud", created_s=0)
        async with asyncio.timeout(30), serving(engine):
            await test(LinkHandler(backend, Metrics(), books=books), books, engine)
        await books.close()

    asyncio.run(main())


def rows(books: AccessControl) -> list[dict[str, Any]]:
    books.usage.flush()
    return [exported(row) for row in books.usage.rows(0, 1e12)]


def lines(books: AccessControl, folder: Path) -> list[dict[str, Any]]:
    assert books.audit is not None
    books.audit.flush()
    file = folder / "audit.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_an_answer_is_charged_to_its_device_and_told_without_its_text(tmp_path: Path) -> None:
    async def test(handler: LinkHandler, books: AccessControl, _: Engine) -> None:
        found = events(await payloads(handler, inbound(body(SECRET, temperature=0))))
        end = found[-1]
        assert isinstance(end, Finished)
        (row,) = rows(books)
        assert (row["key_id"], row["key_name"]) == (f"device:{HANDLE}", HANDLE)
        assert (row["endpoint"], row["model"], row["outcome"]) == ("link", "toy", "ok")
        assert row["status"] == 200
        assert row["prompt_tokens"] == end.usage.prompt_tokens > 0
        assert row["completion_tokens"] == 24
        assert row["cost"] == f"0.{row['prompt_tokens'] + 2 * 24:03}000000"
        (line,) = lines(books, tmp_path)
        assert (line["key_id"], line["client"]) == (f"device:{HANDLE}", HANDLE)
        assert (line["source"], line["path"], line["status"]) == ("link", "link", 200)
        assert line["request_id"] == row["request_id"] == (1).to_bytes(16).hex()
        assert line["completion_tokens"] == 24
        for file in tmp_path.iterdir():
            assert SECRET.encode() not in file.read_bytes()

    run(tmp_path, test)


def test_a_request_that_is_run_twice_is_charged_once(tmp_path: Path) -> None:
    async def test(handler: LinkHandler, books: AccessControl, _: Engine) -> None:
        for number in (1, 1, 2):
            await payloads(handler, inbound(body(temperature=0), number))
        assert [row["request_id"][-1] for row in rows(books)] == ["1", "2"]

    run(tmp_path, test)


def test_a_device_that_gives_up_pays_for_its_prompt_and_what_it_was_sent(tmp_path: Path) -> None:
    async def test(handler: LinkHandler, books: AccessControl, _: Engine) -> None:
        whole = events(await payloads(handler, inbound(body(temperature=0), 1)))[-1]
        assert isinstance(whole, Finished)
        async with aclosing(handler(inbound(body(temperature=0), 2))) as answer:  # type: ignore[type-var]
            sent = events([await anext(answer) for _ in range(4)])
        row = rows(books)[1]
        assert (row["outcome"], row["status"]) == ("aborted", 499)
        assert row["prompt_tokens"] == whole.usage.prompt_tokens
        tokens = sum(len(one.tokens) for one in sent if isinstance(one, TextDelta))
        assert row["completion_tokens"] == tokens > 0

    run(tmp_path, test, behaviour=Behaviour(step_s=0.005))


def test_what_was_refused_is_told_and_costs_nothing(tmp_path: Path) -> None:
    async def test(handler: LinkHandler, books: AccessControl, _: Engine) -> None:
        await payloads(handler, inbound(body(temperature=9)))
        await payloads(handler, inbound(b"\xff", 2))
        assert rows(books) == []
        told = [(line["status"], line["refused"]) for line in lines(books, tmp_path)]
        assert told == [(400, "invalid_request")] * 2

    run(tmp_path, test)


def test_what_failed_on_our_side_is_a_call_without_tokens(tmp_path: Path) -> None:
    behaviour = Behaviour(step_s=0.005)

    async def test(handler: LinkHandler, books: AccessControl, _: Engine) -> None:
        answer = handler(inbound(body(temperature=0)))
        for _routed_and_two_tokens in range(3):
            await anext(answer)
        behaviour.fails = lambda step: True
        end = events([payload async for payload in answer])[-1]
        assert isinstance(end, Failed)
        (row,) = rows(books)
        assert (row["outcome"], row["status"], row["prompt_tokens"]) == ("failed", 500, 0)

    run(tmp_path, test, behaviour=behaviour)


def test_what_a_service_that_stops_leaves_open_is_written_down_when_it_was_answered(
    tmp_path: Path,
) -> None:
    async def test(handler: LinkHandler, books: AccessControl, engine: Engine) -> None:
        await engine.drain(1)
        asking = asyncio.ensure_future(anext(handler(inbound(body()))))
        await handler.settled()
        await asyncio.sleep(0.02)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert (rows(books), lines(books, tmp_path)) == ([], [])

    run(tmp_path, test)


def test_nothing_is_answered_that_could_not_be_charged(tmp_path: Path) -> None:
    async def test(handler: LinkHandler, books: AccessControl, engine: Engine) -> None:
        kept = list(books.usage._waiting)
        books.usage._waiting = [None] * MOST_WAITING  # type: ignore[list-item]
        (only,) = events(await payloads(handler, inbound(body())))
        assert isinstance(only, Failed)
        assert (only.code, only.retryable) == ("unavailable", True)
        assert engine.snapshot().finished == 0
        books.usage._waiting = kept

    run(tmp_path, test)


def test_no_label_of_a_metric_names_a_device(tmp_path: Path) -> None:
    async def test(handler: LinkHandler, books: AccessControl, _: Engine) -> None:
        await payloads(handler, inbound(body(temperature=0)))
        page = books.metrics.render().decode()
        assert 'tidegate_key_calls_total{key="link",outcome="ok"} 1.0' in page
        assert HANDLE not in page

    run(tmp_path, test, metrics_per_key=True)
