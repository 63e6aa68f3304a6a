"""Metrics carry vLLM's names under our prefix."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from echobackend import EchoBackend

from tidegate.api.backend import Route, Routed
from tidegate.api.http import create_app
from tidegate.api.metrics import AskedCall, Metrics
from tidegate.api.schema import read_chat
from tidegate.engine.events import Cancelled, Failed, Finished, TextDelta, Timing, Usage

ROUTED = Routed(route="cloud", reason="x", model="m", request_id="r")
FINISHED = Finished(
    reason="stop",
    usage=Usage(prompt_tokens=100, completion_tokens=5, cached_tokens=40),
    timing=Timing(first_scheduled_s=0.25, first_token_s=1.0, total_s=3.5, decode_s=2.0),
)


def answered(metrics: Metrics, *, asked: AskedCall | None = None, route: Route = "cloud") -> None:
    """One whole answer of two texts."""
    record = metrics.begin()
    if asked is not None:
        record.about(asked)
    record.see(Routed(route=route, reason="x", model="m", request_id="r"))
    record.see(TextDelta(text="a", tokens=(1,)))
    record.see(TextDelta(text="b", tokens=(2, 3)))
    record.see(FINISHED)
    record.end()


def test_an_answer_that_broke_off_counts_as_abort_and_a_failed_one_as_error() -> None:
    metrics = Metrics()
    left = metrics.begin()
    left.see(ROUTED)
    left.see(TextDelta(text="hi", tokens=(1, 2)))
    left.end()
    failed = metrics.begin()
    failed.see(ROUTED)
    failed.see(Failed(code="x", message="y", retryable=False))
    failed.end()
    cancelled = metrics.begin()
    cancelled.see(ROUTED)
    cancelled.see(Cancelled(usage=Usage(prompt_tokens=3, completion_tokens=4)))
    cancelled.end()
    shown = metrics.render().decode()
    for line in (
        'tidegate_request_success_total{finished_reason="abort",model_name="m"} 2.0',
        'tidegate_request_success_total{finished_reason="error",model_name="m"} 1.0',
        'tidegate_requests_total{model_name="m",route="cloud"} 3.0',
        'tidegate_generation_tokens_total{model_name="m"} 4.0',
    ):
        assert line in shown
    assert "tidegate_request_queue_time_seconds_count" not in shown


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("request_queue_time_seconds", 0.25),
        ("request_prefill_time_seconds", 0.75),
        ("request_decode_time_seconds", 2.0),
        ("request_inference_time_seconds", 2.75),
        ("request_time_per_output_token_seconds", 0.5),
        ("request_prompt_tokens", 100.0),
        ("request_prefill_kv_computed_tokens", 60.0),
        ("request_generation_tokens", 5.0),
        ("prompt_tokens_cached_total", 40.0),
    ],
)
def test_where_the_time_and_the_tokens_of_an_answer_went(name: str, seconds: float) -> None:
    metrics = Metrics()
    answered(metrics)
    series = name if name.endswith("_total") else f"{name}_sum"
    assert f'tidegate_{series}{{model_name="m"}} {seconds}\n' in metrics.render().decode()


def test_an_answer_of_one_token_has_no_time_per_further_one() -> None:
    metrics = Metrics()
    record = metrics.begin()
    record.see(ROUTED)
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    record.see(Finished(reason="length", usage=usage, timing=FINISHED.timing))
    shown = metrics.render().decode()
    assert 'tidegate_request_time_per_output_token_seconds_count{model_name="m"}' not in shown


def test_an_answer_from_the_cache_took_no_engines_time() -> None:
    metrics = Metrics()
    answered(metrics, route="cache")
    shown = metrics.render().decode()
    assert "request_decode_time_seconds_count" not in shown
    assert 'tidegate_generation_tokens_total{model_name="m"}' not in shown
    assert 'finished_reason="stop",model_name="m"} 1.0' in shown


def test_a_call_of_three_answers_counts_once_with_its_longest() -> None:
    metrics = Metrics()
    call = read_chat({"messages": [{"role": "user", "content": "x"}], "n": 3, "max_tokens": 70})
    asked = AskedCall(call)
    for _ in range(3):
        answered(metrics, asked=asked)
    shown = metrics.render().decode()
    for line in (
        'tidegate_request_params_n_sum{model_name="m"} 3.0',
        'tidegate_request_params_n_count{model_name="m"} 1.0',
        'tidegate_request_params_max_tokens_sum{model_name="m"} 70.0',
        'tidegate_request_max_num_generation_tokens_count{model_name="m"} 1.0',
        'tidegate_request_max_num_generation_tokens_sum{model_name="m"} 5.0',
        'tidegate_request_generation_tokens_count{model_name="m"} 3.0',
    ):
        assert line in shown


def test_expected_models_are_told_of_before_their_first_call() -> None:
    metrics = Metrics()
    metrics.expect(["m"])
    shown = metrics.render().decode()
    assert 'tidegate_request_success_total{finished_reason="error",model_name="m"} 0.0' in shown
    assert 'tidegate_time_to_first_token_seconds_count{model_name="m"} 0.0' in shown


def test_two_registries_do_not_collide() -> None:
    first, second = Metrics(), Metrics()
    first.begin().see(ROUTED)
    assert b'tidegate_requests_total{model_name="m",route="cloud"} 1.0' in first.render()
    assert b"tidegate_requests_total{" not in second.render()


def test_responses_are_counted_by_route_and_never_by_what_strangers_make_up() -> None:
    async def main() -> str:
        transport = httpx.ASGITransport(create_app(EchoBackend()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
            await client.post("/v1/chat/completions", json=chat)
            await client.post("/v1/chat/completions", json={})
            await client.get("/v1/models/whatever/it/is")
            await client.get("/etc/passwd")
            return (await client.get("/metrics")).text

    shown = asyncio.run(main())
    lines = [line for line in shown.splitlines() if line.startswith("tidegate_http_responses_")]
    assert sorted(lines) == [
        'tidegate_http_responses_total{path="/v1/chat/completions",status="200"} 1.0',
        'tidegate_http_responses_total{path="/v1/chat/completions",status="400"} 1.0',
        'tidegate_http_responses_total{path="/v1/models/{model:path}",status="404"} 1.0',
        'tidegate_http_responses_total{path="other",status="404"} 1.0',
    ]


def test_a_token_costs_little() -> None:
    metrics = Metrics()
    record = metrics.begin()
    record.see(ROUTED)
    delta = TextDelta(text="a", tokens=(1,))
    best_s = float("inf")
    for _ in range(20):
        began_s = time.perf_counter()
        for _ in range(100):
            record.see(delta)
        best_s = min(best_s, (time.perf_counter() - began_s) / 100)
    # About 2 us here; the bound is a hundredth of what a token of one stream may cost.
    assert best_s < 50e-6
