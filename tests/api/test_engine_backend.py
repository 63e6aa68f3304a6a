"""A real engine behind the HTTP surface, on a toy model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import httpx
import pytest
from httpengine import CHAT, body, streamed, with_engine
from memorystore import MemoryStore
from toyengine import PAGED, toy_engine
from toyengine import serving as running
from toyexecutor import Behaviour, ToyExecutor

from tidegate.api.backend import Routed
from tidegate.api.engine_backend import EngineBackend, fit_sampling, new_request_id
from tidegate.api.schema import read_chat
from tidegate.engine.drafts import Draft, Wish
from tidegate.engine.drafts_lookup import LookupDrafter
from tidegate.engine.engine import Engine
from tidegate.engine.events import Finished, TextDelta
from tidegate.engine.prefix_disk import DiskPrefixes
from tidegate.engine.settings import EngineSettings
from tidegate.errors import RequestError


def slow_engine(*, settings: EngineSettings | None = None) -> Engine:
    """20 ms a step and no end token: answers as long as their limit."""
    executor = ToyExecutor(PAGED, behaviour=Behaviour(step_s=0.02))
    return toy_engine(executor, eos=False, settings=settings)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_streamed_answer_is_the_whole_answer_in_pieces() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        whole = (await client.post(CHAT, json=body(max_tokens=12))).json()
        chunks = await streamed(client, max_tokens=12, stream_options={"include_usage": True})
        said = "".join(
            one["choices"][0]["delta"].get("content", "") for one in chunks if one["choices"]
        )
        assert said == whole["choices"][0]["message"]["content"]
        assert whole["usage"]["completion_tokens"] == 12
        assert chunks[-1]["usage"]["completion_tokens"] == 12
        assert whole["choices"][0]["finish_reason"] == "length"
        assert whole["tidegate"]["route"] == "edge"
        assert whole["tidegate"]["ttft_s"] >= 0

    with_engine(test, toy_engine(eos=False))


def test_a_call_may_ask_that_nothing_is_guessed() -> None:
    seen: list[bool] = []

    class Watching(LookupDrafter):
        def propose(self, wishes: Sequence[Wish]) -> list[Draft]:
            seen.extend(wish.most > 0 for wish in wishes)
            return super().propose(wishes)

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        await client.post(CHAT, json=body(max_tokens=9, tidegate={"speculation": False}))
        assert not seen
        await client.post(CHAT, json=body(max_tokens=9))
        assert any(seen)

    with_engine(test, toy_engine(eos=False, drafters=[Watching(most_requests=1)]))


def test_an_answer_without_a_limit_ends_with_the_context() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        answer = (await client.post(CHAT, json=body())).json()
        assert answer["usage"]["total_tokens"] == engine.context_tokens
        assert answer["choices"][0]["finish_reason"] == "length"

    with_engine(test, toy_engine(eos=False))


def test_a_client_that_leaves_frees_the_engine() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        for stream in (True, False):
            asking = asyncio.create_task(client.post(CHAT, json=body(stream=stream)))
            await until(lambda: engine.snapshot().running == 1)
            asking.cancel()
            await until(lambda: engine.snapshot().running == 0)
        assert engine.snapshot().cancelled == 2
        await until(lambda: engine.snapshot().kv_usage == 0)  # within the step in flight

    with_engine(test, slow_engine())


def test_a_prompt_beyond_the_context_is_refused_by_name() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        for said in ("tide gate " * 100, "x" * 200_000):
            answer = await client.post(CHAT, json=body(said))
            assert answer.status_code in (400, 413)
            assert answer.json()["error"]["param"] == "messages"
            assert "tide gate" not in answer.text

    with_engine(test, toy_engine())


def test_a_full_queue_is_a_429_and_the_others_are_answered() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        answers = await asyncio.gather(
            *(client.post(CHAT, json=body(max_tokens=8)) for _ in range(12))
        )
        codes = [one.status_code for one in answers]
        assert set(codes) == {200, 429}
        assert all("retry-after" in one.headers for one in answers if one.status_code == 429)
        shown = (await client.get("/metrics")).text
        assert f'{{code="over_capacity"}} {codes.count(429)}.0' in shown

    with_engine(test, slow_engine(settings=EngineSettings(most_waiting=2)))


def test_a_failed_step_is_an_error_for_its_calls_and_no_more() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        behaviour.fails = lambda step: True
        answer = await client.post(CHAT, json=body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "execution_failed")
        behaviour.fails = lambda step: False
        assert (await client.post(CHAT, json=body(max_tokens=2))).status_code == 200

    behaviour = Behaviour()
    with_engine(test, toy_engine(ToyExecutor(PAGED, behaviour=behaviour), eos=False))


def test_draining_flips_readiness_and_not_health() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        assert (await client.get("/ready")).status_code == 200
        await engine.drain(1)
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert (await client.post(CHAT, json=body())).status_code == 503

    with_engine(test, toy_engine())


def test_metrics_show_the_engine_under_vllms_names() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        await client.post(CHAT, json=body(max_tokens=3))
        shown = (await client.get("/metrics")).text
        for line in (
            'tidegate_num_requests_running{model_name="toy"} 0.0',
            'tidegate_kv_cache_usage_perc{model_name="toy"} 0.0',
            'tidegate_generation_tokens_total{model_name="toy"} 3.0',
        ):
            assert line in shown

    with_engine(test, toy_engine(eos=False))


def test_a_limit_is_clamped_to_what_the_context_leaves() -> None:
    asked = read_chat(body(max_tokens=100)).sampling
    assert fit_sampling(asked, 20, 128).max_tokens == 100
    assert fit_sampling(asked, 100, 128).max_tokens == 28
    assert fit_sampling(asked, 128, 128).max_tokens == 1
    assert fit_sampling(asked, 500, 128).max_tokens == 1


def test_a_call_that_comes_with_an_id_keeps_it() -> None:
    async def run() -> None:
        engine = toy_engine(eos=False)
        backend = EngineBackend(engine, route="cloud", created_s=7)
        async with running(engine):
            call = read_chat(body(max_tokens=3, model="toy"))
            routed, *texts, end = [event async for event in backend.answer_as(call, "ab" * 16)]
            assert isinstance(routed, Routed)
            assert (routed.request_id, routed.route, routed.model) == ("ab" * 16, "cloud", "toy")
            assert all(isinstance(event, TextDelta) for event in texts)
            assert isinstance(end, Finished)
            with pytest.raises(RequestError, match="must be 'toy'"):
                _ = [event async for event in backend.answer_as(replace(call, model="x"), "a")]
        assert backend.models()[0].created_s == 7

    asyncio.run(run())


def test_two_calls_never_share_an_id() -> None:
    assert len({new_request_id() for _ in range(1000)}) == 1000
    assert all(len(bytes.fromhex(new_request_id())) == 16 for _ in range(10))


def test_a_prompt_of_token_ids_is_taken_as_it_is() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        fields = {"max_tokens": 4, "temperature": 0}
        words = "tide gate"
        ids = list(engine.text.encode_prompt(words))
        as_ids = await client.post("/v1/completions", json={"prompt": ids, **fields})
        as_text = await client.post("/v1/completions", json={"prompt": words, **fields})
        assert as_ids.json()["choices"] == as_text.json()["choices"]
        beyond = await client.post("/v1/completions", json={"prompt": [299, 300], **fields})
        assert beyond.status_code == 400
        assert beyond.json()["error"]["param"] == "prompt"
        too_many = await client.post("/v1/completions", json={"prompt": [5] * 128, **fields})
        assert too_many.status_code in (400, 413)
        assert "128" in too_many.json()["error"]["message"]

    with_engine(test, toy_engine(eos=False))


def test_a_call_without_cache_reuses_no_prefix_and_the_disk_tier_shows_in_the_metrics() -> None:
    executor = ToyExecutor(PAGED)
    store = MemoryStore()
    disk = DiskPrefixes(store, executor, model_digest=b"", least_tokens=8)

    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        def cached(answer: httpx.Response) -> int:
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        private = body("hello there, hello there", max_tokens=3, tidegate={"cache": False})
        assert cached(await client.post(CHAT, json=private)) == 0
        plain = body("hello there, hello there", max_tokens=3)
        assert cached(await client.post(CHAT, json=plain)) == 0
        assert cached(await client.post(CHAT, json=plain)) > 8
        assert cached(await client.post(CHAT, json=private)) == 0
        await until(lambda: len(store.kept) > 0)
        text = (await client.get("/metrics")).text
        assert f'tidegate_prefix_disk_units{{model_name="toy"}} {len(store.kept)}.0' in text
        assert 'tidegate_prefix_disk_hit_tokens_total{model_name="toy"} 0.0' in text

    with_engine(test, toy_engine(executor, disk=disk))
