"""Spans of requests: one for each, its phases below it, and not a word of what was said."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from echobackend import EchoBackend
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import StatusCode
from otlpreceiver import otlp_receiver

from tidegate.api.http import create_app
from tidegate.api.log_context import LogContext, log_context, logged_as, trace_id_of
from tidegate.api.otel import OtelTracer
from tidegate.api.settings import HttpSettings
from tidegate.api.trace_settings import TraceSettings, tracing
from tidegate.engine.events import Failed
from tidegate.errors import CapacityError, ConfigError

CHAT = "/v1/chat/completions"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
SAID = "the confidential heron nests"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": SAID}]}


def traced(
    *bodies: dict[str, Any],
    backend: EchoBackend | None = None,
    path: str = CHAT,
    heads: dict[str, str] | None = None,
    share: float = 1.0,
) -> list[ReadableSpan]:
    """The spans of these requests, in the order in which they ended."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)))
    provider.add_span_processor(SimpleSpanProcessor(memory))
    settings = HttpSettings(tracer=OtelTracer(provider))
    app = create_app(backend or EchoBackend(), settings=settings)

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for body in bodies:
                await client.post(path, json=body, headers=heads)
            await client.get("/health")

    asyncio.run(main())
    provider.shutdown()
    return list(memory.get_finished_spans())


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def top(spans: Sequence[ReadableSpan]) -> ReadableSpan:
    return spans[-1]  # a request ends after its answers' phases


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer_is_a_span_with_its_phases_below(stream: bool) -> None:
    *phases, request = traced(HELLO | {"stream": stream, "max_tokens": 3, "seed": 7})
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    assert request.name == "chat echo-1"
    assert request.context is not None
    for span in phases:
        assert span.parent is not None
        assert span.context is not None
        assert span.parent.span_id == request.context.span_id
        assert span.context.trace_id == request.context.trace_id
    told = facts(request)
    expected = {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tidegate",
        "gen_ai.request.model": "echo-1",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.response.model": "echo-1",
        "gen_ai.response.id": "r1",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "tidegate.route": "edge",
        "tidegate.request_id": "r1",
    }
    assert {name: told[name] for name in expected} == expected
    assert request.status.status_code is StatusCode.UNSET


def test_phases_follow_one_another_and_last_as_long_as_the_engine_said() -> None:
    queue, prefill, decode, _ = traced(HELLO)
    assert (queue.start_time, queue.end_time) == (queue.start_time, prefill.start_time)
    assert prefill.end_time == decode.start_time
    for span, seconds in ((queue, 0.0), (prefill, 0.25), (decode, 1.0)):
        assert span.start_time is not None
        assert span.end_time is not None
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seconds, abs=1e-6)


def test_the_callers_trace_goes_on_and_is_its_decision() -> None:
    request = top(traced(HELLO, heads={"traceparent": PARENT, "tracestate": "a=1"}, share=0.0))
    assert request.context is not None
    assert request.parent is not None
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert request.context.trace_state.get("a") == "1"
    unsampled = PARENT.removesuffix("01") + "00"
    assert traced(HELLO, heads={"traceparent": unsampled}, share=1.0) == []
    assert traced(HELLO, share=0.0) == []


def test_answers_of_one_call_share_its_span() -> None:
    *phases, request = traced(HELLO | {"n": 3})
    assert len(phases) == 9
    told = facts(request)
    assert told["gen_ai.request.choice.count"] == 3
    assert told["gen_ai.response.finish_reasons"] == ("stop",) * 3
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (4, 12)


@pytest.mark.parametrize(
    ("backend", "status", "error"),
    [
        (EchoBackend(refuse=CapacityError("full of " + SAID)), 429, "over_capacity"),
        (EchoBackend(refuse=ValueError(SAID)), 500, "internal_error"),
        (
            EchoBackend(
                break_after=1, breaking=Failed(code="unavailable", message=SAID, retryable=True)
            ),
            503,
            "unavailable",
        ),
    ],
)
def test_a_failure_is_told_by_its_code_alone(backend: EchoBackend, status: int, error: str) -> None:
    request = top(traced(HELLO, backend=backend))
    assert facts(request)["http.response.status_code"] == status
    assert facts(request)["error.type"] == error
    assert request.status.status_code is StatusCode.ERROR
    assert SAID not in request.to_json()


def test_a_bad_request_has_its_status_and_is_no_error_of_ours() -> None:
    request = top(traced({"messages": SAID}))
    assert request.name == f"POST {CHAT}"
    assert facts(request)["http.response.status_code"] == 400
    assert "error.type" not in facts(request)


def test_no_span_holds_a_word_that_was_said_and_unknown_paths_are_one() -> None:
    bodies = (
        HELLO | {"stop": ["heron"], "stream": True},
        {"messages": [{"role": "user", "content": SAID}], "user": SAID},
        HELLO | {"temperature": 9},
    )
    spans = traced(*bodies) + traced(HELLO, path=f"/{SAID}".replace(" ", "-"))
    assert spans[-1].name == "POST other"
    text = "".join(span.to_json() for span in spans)
    for word in ("confidential", "heron", "nests"):
        assert word not in text


def test_probes_are_not_traced() -> None:
    assert traced() == []


def test_without_tracing_the_library_is_not_even_imported() -> None:
    code = (
        "import sys, tidegate.api.http, tidegate.api.trace_settings, tidegate.cloud.handler\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_spans_reach_a_collector_over_http() -> None:
    async def main(url: str) -> None:
        async with tracing(TraceSettings(endpoint=url, service="tidegate-test")) as tracer:
            app = create_app(EchoBackend(), settings=HttpSettings(tracer=tracer))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await client.post(CHAT, json=HELLO, headers={"traceparent": PARENT})

    with otlp_receiver() as receiver:
        asyncio.run(main(receiver.url))
    assert [span.name for span in receiver.spans] == ["queue", "prefill", "decode", "chat echo-1"]
    request = receiver.spans[-1]
    assert (request.trace_id, request.service) == (TRACE, "tidegate-test")
    assert request.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert SAID.encode() not in receiver.raw


def test_a_collector_that_is_not_there_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> int:
        settings = TraceSettings(endpoint="http://127.0.0.1:9/v1/traces", service="t")
        async with tracing(settings) as tracer:
            app = create_app(EchoBackend(), settings=HttpSettings(tracer=tracer))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return (await client.post(CHAT, json=HELLO)).status_code

    assert asyncio.run(asyncio.wait_for(main(), 20)) == 200
    assert SAID not in caplog.text


@pytest.mark.parametrize("endpoint", ["", "collector:4318", "ftp://collector/v1/traces"])
def test_an_endpoint_that_is_none_is_refused_without_showing_it(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"otlp-traces-endpoint = '\.\.\.'"):
        TraceSettings(endpoint=endpoint, service="t")
    with pytest.raises(ConfigError, match="trace-share"):
        TraceSettings(endpoint="http://c/v1/traces", service="t", share=1.5)


@given(st.text(max_size=70) | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"))
def test_a_traceparent_names_a_trace_or_none(text: str) -> None:
    found = trace_id_of(text)
    assert found is None or (len(found) == 32 and found == text[3:35])


@pytest.mark.parametrize(
    ("text", "trace"),
    [
        (PARENT, TRACE),
        (PARENT.replace(TRACE, "0" * 32), None),
        ("ff" + PARENT[2:], None),
        (f"01-{TRACE}-00f067aa0ba902b7-01-later", TRACE),
        (PARENT.upper(), None),
        ("", None),
    ],
)
def test_traces_that_the_specification_forbids_are_none(text: str, trace: str | None) -> None:
    assert trace_id_of(text) == trace


def test_a_request_is_known_to_the_log_in_its_task_and_in_no_other() -> None:
    async def main() -> None:
        context = LogContext(request_id="r", trace_id=None)
        with logged_as(context):
            assert log_context() is context
            assert await asyncio.create_task(_seen()) is context
        assert log_context() is None

    async def _seen() -> LogContext | None:
        return log_context()

    asyncio.run(main())
