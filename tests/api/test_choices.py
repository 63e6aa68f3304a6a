"""Several answers to one call: side by side, one prompt, one end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from echobackend import EchoBackend
from toyengine import SHAPES, serving, toy_engine
from toyexecutor import ToyExecutor

from tidegate.api.backend import AnswerEvent
from tidegate.api.choices import merged, seed_of
from tidegate.api.engine_backend import EngineBackend
from tidegate.api.http import create_app
from tidegate.api.metrics import Metrics
from tidegate.api.schema import Call
from tidegate.engine.events import Failed, Finished, Timing, Usage
from tidegate.engine.executor import PagedGeometry, SlotGeometry

CHAT = "/v1/chat/completions"
LONG = [{"role": "user", "content": "the tide is at the gate and the quick brown fox is not here"}]


class Counting(EngineBackend):
    """An engine that remembers the calls it was asked and what their ends said."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.calls: list[Call] = []
        self.usages: list[Usage] = []

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        self.calls.append(call)
        async for event in super().answer(call):
            if isinstance(event, Finished):
                self.usages.append(event.usage)
            yield event


def asked(
    path: str,
    body: dict[str, object],
    shape: PagedGeometry | SlotGeometry = SHAPES[0],
) -> tuple[httpx.Response, Counting]:
    async def run() -> tuple[httpx.Response, Counting]:
        engine = toy_engine(ToyExecutor(shape), eos=False)
        backend = Counting(engine, route="edge", created_s=0)
        transport = httpx.ASGITransport(create_app(backend))
        async with (
            serving(engine),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            return await client.post(path, json=body), backend

    return asyncio.run(run())


def events_of(response: httpx.Response) -> list[Any]:
    datas = [one.removeprefix("data: ") for one in response.text.split("\n\n") if one]
    assert datas.pop() == "[DONE]"
    return [json.loads(one) for one in datas]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prompt_counts_once_and_its_kv_is_shared(
    shape: PagedGeometry | SlotGeometry,
) -> None:
    response, backend = asked(
        CHAT, {"messages": LONG, "n": 3, "seed": 5, "max_tokens": 12, "temperature": 1}, shape
    )
    body = response.json()
    assert [one["index"] for one in body["choices"]] == [0, 1, 2]
    texts = [one["message"]["content"] for one in body["choices"]]
    assert len(set(texts)) == 3
    prompt_tokens = backend.usages[0].prompt_tokens
    assert body["usage"]["prompt_tokens"] == prompt_tokens > 16
    assert body["usage"]["completion_tokens"] == 36
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert all(usage.cached_tokens >= 16 for usage in backend.usages[1:])


def test_each_choice_is_the_answer_of_its_own_seed_and_the_first_of_the_calls() -> None:
    body: dict[str, object] = {"messages": LONG, "max_tokens": 12, "temperature": 1}
    several, backend = asked(CHAT, body | {"seed": 5, "n": 3})
    assert [call.sampling.seed for call in backend.calls] == [5, seed_of(5, 1), seed_of(5, 2)]
    for index, choice in enumerate(several.json()["choices"]):
        alone, _ = asked(CHAT, body | {"seed": seed_of(5, index)})
        assert alone.json()["choices"][0]["message"] == choice["message"]


def test_derived_seeds_differ_and_stay_the_same_in_every_version() -> None:
    assert seed_of(5, 0) == 5
    assert seed_of(5, 1) == 8207932239421579764
    seeds = {seed_of(seed, index) for seed in range(20) for index in range(16)}
    assert len(seeds) == 20 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_tells_every_choice_with_its_index_and_the_sum_at_the_end(path: str) -> None:
    body: dict[str, object] = {"n": 3, "seed": 2, "max_tokens": 8, "temperature": 1, "logprobs": 0}
    body |= {"messages": LONG, "logprobs": True} if path == CHAT else {"prompt": "the tide"}
    whole = asked(path, body)[0].json()
    streamed = asked(path, body | {"stream": True, "stream_options": {"include_usage": True}})[0]
    *chunks, usage = events_of(streamed)
    assert len({one["id"] for one in [*chunks, usage]}) == 1
    for index, expected in enumerate(whole["choices"]):
        mine = [one["choices"][0] for one in chunks if one["choices"][0]["index"] == index]
        if path == CHAT:
            assert mine[0]["delta"]["role"] == "assistant"
            said = "".join(one["delta"].get("content") or "" for one in mine)
            assert said == expected["message"]["content"]
        else:
            assert "".join(one["text"] for one in mine) == expected["text"]
        assert [one["finish_reason"] for one in mine if one["finish_reason"]] == ["length"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][name] == whole["usage"][name]
    assert usage["choices"] == []


def test_greedy_choices_are_all_the_same() -> None:
    response, _ = asked(CHAT, {"messages": LONG, "n": 2, "max_tokens": 8, "temperature": 0})
    one, other = response.json()["choices"]
    assert one["message"] == other["message"]


def echoed(backend: EchoBackend, **body: object) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(backend))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(CHAT, json={"messages": LONG, **body})

    return asyncio.run(run())


class FailingLater(EchoBackend):
    """Answers the first call and fails every later one midway."""

    async def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        if self.begun:
            self.break_after = 2
            self.breaking = Failed(code="unavailable", message="the peer left", retryable=True)
        async for event in super().answer(call):
            yield event


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_fails_the_call_and_ends_the_others(stream: bool) -> None:
    backend = FailingLater(word_s=0.005)
    response = echoed(backend, n=4, stream=stream)
    if stream:
        last = [one for one in response.text.split("\n\n") if one][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert backend.begun == backend.closed + backend.ended


def test_leaving_ends_every_choice() -> None:
    async def run() -> EchoBackend:
        backend = EchoBackend(word_s=0.01, repeat=50)
        transport = httpx.ASGITransport(create_app(backend))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asking = asyncio.create_task(client.post(CHAT, json={"messages": LONG, "n": 5}))
            async with asyncio.timeout(5):
                while backend.begun < 5:
                    await asyncio.sleep(0.005)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        return backend

    backend = asyncio.run(run())
    assert (backend.closed, backend.ended) == (5, 0)


def test_later_choices_run_where_the_first_one_runs() -> None:
    backend = EchoBackend()
    echoed(backend, n=3)
    assert [call.options.route for call in backend.calls] == ["auto", "edge", "edge"]
    backend = EchoBackend()
    echoed(backend, n=2, tidegate={"route": "cloud"})
    assert [call.options.route for call in backend.calls] == ["cloud", "cloud"]


def test_every_choice_is_counted_as_an_answer() -> None:
    async def run() -> bytes:
        metrics = Metrics()
        app = create_app(EchoBackend(), metrics=metrics)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post(CHAT, json={"messages": LONG, "n": 3})
        return metrics.render()

    assert b'tidegate_request_success_total{finished_reason="stop",model_name="echo-1"} 3.0' in (
        asyncio.run(run())
    )


def test_the_end_of_several_is_their_sum_over_their_common_time() -> None:
    def end(tokens: int, first_s: float, total_s: float) -> Finished:
        return Finished(
            reason="stop",
            usage=Usage(
                prompt_tokens=7,
                completion_tokens=tokens,
                cached_tokens=tokens,
                accepted_draft_tokens=1,
                rejected_draft_tokens=2,
            ),
            timing=Timing(
                first_scheduled_s=0.1, first_token_s=first_s, total_s=total_s, decode_s=0.5
            ),
        )

    assert merged([end(3, 1.0, 2.0)]) == end(3, 1.0, 2.0)
    several = merged([end(3, 1.0, 2.0), end(4, 1.5, 4.0)])
    assert several.usage == Usage(
        prompt_tokens=7,
        completion_tokens=7,
        cached_tokens=3,
        accepted_draft_tokens=2,
        rejected_draft_tokens=4,
    )
    assert several.timing == Timing(
        first_scheduled_s=0.1, first_token_s=1.0, total_s=4.0, decode_s=3.0
    )
